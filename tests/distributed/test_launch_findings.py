"""What is wrong with a launch: findings on machines that need not be here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from swiftmoe_lightning.distributed.launch_facts import RankFacts
from swiftmoe_lightning.distributed.launch_findings import Finding, find_problems, ranks_per_host, ranks_text

VERSIONS = {"python": "3.12.1", "torch": "2.13.0+cu130", "lightning": "2.6.6", "NCCL": "2.29.7"}


def cluster(hosts: int = 2, per_host: int = 2, gpus: bool = True) -> list[RankFacts]:
    """Ranks of a launch in which nothing is wrong."""
    return [
        RankFacts(
            rank=host * per_host + local,
            local_rank=local,
            world_size=hosts * per_host,
            host=f"node{host}",
            host_address=f"10.0.0.{host + 1}",
            master_address="10.0.0.1",
            interfaces=("eth0",),
            versions=VERSIONS,
            has_nvidia_driver=gpus,
            gpus=tuple(f"GPU-{host}-{index}" for index in range(per_host)) if gpus else (),
            gpu_name="NVIDIA H100" if gpus else None,
        )
        for host in range(hosts)
        for local in range(per_host)
    ]


def changed(ranks: list[RankFacts], which: tuple[int, ...], **changes: Any) -> list[RankFacts]:
    return [replace(facts, **changes) if facts.rank in which else facts for facts in ranks]


def found(ranks: list[RankFacts], world_size: int | None = None) -> Finding:
    """The one finding of a launch."""
    (finding,) = find_problems(ranks, world_size or len(ranks))
    return finding


@pytest.mark.parametrize("ranks", [cluster(), cluster(gpus=False), cluster(1, 1), cluster(1, 8), cluster(8, 1)])
def test_where_nothing_is_wrong_nothing_is_found(ranks: list[RankFacts]) -> None:
    assert find_problems(ranks, len(ranks)) == []


def test_ranks_that_did_not_come_are_named_with_those_that_did() -> None:
    ranks = [facts for facts in cluster(2, 4) if facts.rank not in (2, 5, 6, 7)]
    missing = find_problems(ranks, 8)[0]
    assert missing.what == "Ranks 2, 5-7 of 8 did not come; ranks 0-1, 3-4 did."
    assert missing.is_problem
    assert "let their hosts reach 10.0.0.1" in missing.fix
    at_home = changed(cluster(1, 2), (0, 1), master_address="localhost")
    assert "MASTER_ADDR is localhost, which other hosts take for themselves" in find_problems(at_home, 4)[0].fix


@pytest.mark.parametrize("name", VERSIONS)
def test_versions_that_differ_are_named_with_their_ranks(name: str) -> None:
    ranks = changed(cluster(), (2, 3), versions=VERSIONS | {name: None if name == "NCCL" else "1.0"})
    finding = found(ranks)
    other = "none" if name == "NCCL" else "1.0"
    assert finding.what == f"{name} differs: {VERSIONS[name]} on ranks 0-1; {other} on ranks 2-3."
    assert finding.is_problem
    assert finding.fix == f"Install one {name} on all hosts."


def test_world_sizes_that_differ_are_a_problem() -> None:
    assert found(changed(cluster(), (3,), world_size=8)).what == "WORLD_SIZE differs: 4 on ranks 0-2; 8 on rank 3."


def test_two_ranks_on_one_gpu_are_a_problem() -> None:
    finding = found(changed(cluster(), (2, 3), gpus=("GPU-1-0", "GPU-1-0")))
    assert finding.what == "Ranks 2-3 share one GPU (GPU-1-0)."
    assert finding.is_problem


def test_a_rank_without_a_gpu_of_its_own_is_a_problem() -> None:
    """SLURM's --gpus-per-task shows each rank one GPU, which is number 0 for all of them."""
    finding = found(changed(cluster(), (3,), gpus=("GPU-1-1",)))
    assert finding.what == "Rank 3 is number 1 on node1, and sees 1 GPUs."
    assert "let each rank see all of them" in finding.fix


def test_a_torch_without_cuda_on_a_host_with_gpus_is_a_problem() -> None:
    blind, mixed = find_problems(changed(cluster(), (2, 3), gpus=()), 4)
    assert blind.what == "The hosts of ranks 2-3 have an NVIDIA driver, but torch sees no GPU there."
    assert mixed.what == "Ranks 2-3 see no GPU, and others do."
    assert found(changed(cluster(), (0, 1, 2, 3), gpus=())).what.startswith("The hosts of ranks 0-3")


@pytest.mark.parametrize(
    ("address", "said"), [("127.0.1.1", "resolves to 127.0.1.1 there"), (None, "does not resolve")]
)
def test_a_hosts_name_that_leads_to_itself_is_a_problem_under_gloo_on_several_hosts(
    address: str | None, said: str
) -> None:
    ranks = changed(cluster(gpus=False), (2, 3), host_address=address)
    finding = found(ranks)
    assert finding.what == f"The name of host node1 {said}, where other hosts cannot reach it."
    assert "Set GLOO_SOCKET_IFNAME on node1" in finding.fix
    # A chosen network, NCCL, or one host alone do without the name.
    assert find_problems(changed(ranks, (2, 3), chosen_interface="eth0"), 4) == []
    assert find_problems(changed(cluster(), (2, 3), host_address=address), 4) == []
    assert find_problems(changed(cluster(1, 4, gpus=False), (0, 1, 2, 3), host_address=address), 4) == []


def test_what_makes_a_run_slow_is_no_problem() -> None:
    peers = found(changed(changed(cluster(), (0,), gpus_out_of_reach=(1,)), (1,), gpus_out_of_reach=(0,)))
    assert peers.what == "On node0 GPUs cannot access each other's memory: 0-1, 1-0. The host copies for them."
    networks = found(changed(cluster(), (0, 1, 2, 3), interfaces=("eth0", "ib0")))
    assert networks.what.startswith("Host node0 has several networks: eth0, ib0 (and 1 more hosts).")
    assert not find_problems(changed(cluster(), (0, 1, 2, 3), interfaces=("eth0", "ib0"), chosen_interface="ib0"), 4)
    scattered = found([replace(facts, host=f"node{facts.rank % 2}") for facts in cluster()])
    assert scattered.what.startswith("Ranks 0, 2 share a host, but are no neighbours.")
    assert "--distribution=block" in scattered.fix
    ragged = found([replace(facts, host="node0" if facts.rank < 3 else "node1") for facts in cluster()])
    assert ragged.what.startswith("Hosts have different numbers of ranks: 3 on node0, 1 on node1.")
    assert not any(finding.is_problem for finding in (peers, networks, scattered, ragged))


def test_neighbours_are_counted_where_all_hosts_have_equally_many() -> None:
    assert [ranks_per_host(cluster(hosts, 2)) for hosts in (1, 2, 3)] == [2, 2, 2]
    assert ranks_per_host([replace(facts, host=f"node{facts.rank % 2}") for facts in cluster()]) == 0


@pytest.mark.parametrize(
    ("ranks", "expected"), [([3], "rank 3"), ([0, 1, 2, 5], "ranks 0-2, 5"), ([0, 2, 4], "ranks 0, 2, 4")]
)
def test_ranks_are_told_in_short(ranks: list[int], expected: str) -> None:
    assert ranks_text(ranks) == expected
