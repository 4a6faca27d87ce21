"""Ranks behind links of a stated speed: the commands by literals, what is refused, and real ranks where root may."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from benchmarks import links as command
from benchmarks.common.links import Links, bytes_sent_by_node, missing_for_links, shaped
from tests.helpers import run_ranks

SWITCH = [
    "ip netns add t-switch",
    "ip -n t-switch link add switch type bridge",
    "ip -n t-switch link set switch up",
]
SECOND_RANK = [
    "ip netns add t-1",
    "ip -n t-1 link set lo up",
    "ip -n t-switch link add port1 type veth peer name uplink netns t-1",
    "ip -n t-switch link set port1 master switch up",
    "ip -n t-1 address add 10.0.0.2/24 dev uplink",
    "ip -n t-1 link set uplink up",
    "tc -n t-1 qdisc add dev uplink root tbf rate 100mbit burst 131072 latency 100ms",
    "tc -n t-switch qdisc add dev port1 root tbf rate 100mbit burst 131072 latency 100ms",
]


def test_the_commands_make_a_switch_and_a_shaped_link_a_rank() -> None:
    making = Links(num_ranks=2, mbit=100, name="t").making()
    assert making[:3] == SWITCH
    assert making[3:11] == [
        "ip netns add t-0",
        "ip -n t-0 link set lo up",
        "ip -n t-switch link add port0 type veth peer name uplink netns t-0",
        "ip -n t-switch link set port0 master switch up",
        "ip -n t-0 address add 10.0.0.1/24 dev uplink",
        "ip -n t-0 link set uplink up",
        "tc -n t-0 qdisc add dev uplink root tbf rate 100mbit burst 131072 latency 100ms",
        "tc -n t-switch qdisc add dev port0 root tbf rate 100mbit burst 131072 latency 100ms",
    ]
    assert making[11:] == SECOND_RANK


def test_a_fast_links_bucket_holds_a_millisecond() -> None:
    bucket = Links(num_ranks=1, mbit=10_000, name="t").making()[-1].partition("root ")[2]
    assert bucket == "tbf rate 10000mbit burst 1250000 latency 100ms"


def test_removing_the_namespaces_removes_everything() -> None:
    removal = Links(num_ranks=2, mbit=100, name="t").removal()
    assert removal == ["ip netns delete t-0", "ip netns delete t-1", "ip netns delete t-switch"]


def test_links_of_no_speed_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or more megabits a second, got 2 nodes and 0"):
        Links(num_ranks=2, mbit=0)


def test_nodes_of_different_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="got 4 ranks and 3 a node. Choose a number of ranks a node that divides"):
        Links(num_ranks=4, mbit=1, ranks_per_node=3)


def test_the_ranks_of_a_node_share_its_link() -> None:
    shared = Links(num_ranks=4, mbit=100, ranks_per_node=2, name="t")
    assert shared.num_nodes == 2
    assert shared.making() == Links(num_ranks=2, mbit=100, name="t").making()
    assert shared.removal() == Links(num_ranks=2, mbit=100, name="t").removal()


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert missing_for_links() == "Links are shaped with Linux's network namespaces, and this is darwin."
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "tc" else "/sbin/ip")
    assert missing_for_links() == "Links are shaped with iproute2, and tc cannot be found: install iproute2."
    monkeypatch.setattr(shutil, "which", lambda program: f"/sbin/{program}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert (
        missing_for_links() == "Links are shaped in network namespaces, which only root makes: run the command as root."
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert missing_for_links() is None


def _namespaces() -> str:
    return subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def links() -> Links:
    """Of two ranks, where they can be made: root in a container often may not."""
    if missing := missing_for_links():
        pytest.skip(missing)
    links = Links(num_ranks=2, mbit=50)
    try:
        with shaped(links):
            return links
    except RuntimeError as error:
        pytest.skip(str(error))


def _exchange(links: Links) -> float:
    """Seconds in which two ranks send each other 4 MB."""
    links.join(int(os.environ["RANK"]), timeout_s=30)
    send = torch.full((2, 1_000_000), float(dist.get_rank()))
    received = torch.empty_like(send)
    dist.barrier()
    begin = time.perf_counter()
    dist.all_to_all_single(received, send)
    seconds = time.perf_counter() - begin
    assert received.mean(1).tolist() == [0.0, 1.0]
    return seconds


def test_a_link_lets_through_no_more_than_it_is_said_to(links: Links) -> None:
    with shaped(links):
        seconds = run_ranks(_exchange, 2, links, init=False)
    # 32 Mbit at 50 a second, but for the first megabit, which the buckets hold.
    assert min(seconds) > 0.6
    assert links.name not in _namespaces()


def _bytes_over_links(links: Links) -> tuple[int, int, str]:
    """What this rank's node sends while neighbours send each other 4 MB, and while ranks 0 and 2, 1 and 3 do."""
    rank = int(os.environ["RANK"])
    links.join(rank, timeout_s=30)
    sent = []
    for other in (rank ^ 1, rank ^ 2):
        dist.barrier()
        before = bytes_sent_by_node()
        # No rank reads the counter again before all have sent.
        dist.barrier()
        work = dist.isend(torch.zeros(1_000_000), other)
        dist.recv(torch.empty(1_000_000), other)
        work.wait()
        dist.barrier()
        sent.append(bytes_sent_by_node() - before)
    return sent[0], sent[1], os.environ["LOCAL_WORLD_SIZE"]


def test_only_what_leaves_a_node_is_counted_on_its_link(links: Links) -> None:
    nodes = Links(num_ranks=4, mbit=1000, ranks_per_node=2)
    with shaped(nodes):
        counted = run_ranks(_bytes_over_links, 4, nodes, init=False)
    for within, between, ranks_per_node in counted:
        # Barriers alone, against two messages of 4 MB in packets with headers.
        assert within < 100_000
        assert 8_000_000 < between < 9_000_000
        assert ranks_per_node == "2"


def test_the_command_makes_links_and_removes_them(links: Links, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--nodes", "2", "--prefix", links.name]
    command.main(["up", "--mbit", "50", *arguments])
    assert capsys.readouterr().out.splitlines()[1].startswith(f"ip netns exec {links.name}-1 env ")
    assert f"{links.name}-1" in _namespaces()
    with pytest.raises(SystemExit):
        command.main(["up", *arguments])
    assert "failed: Cannot create namespace" in capsys.readouterr().err
    assert f"{links.name}-1" in _namespaces()
    command.main(["down", *arguments])
    assert links.name not in _namespaces()


def _fail_within(links: Links) -> None:
    with shaped(links):
        assert links.name in _namespaces()
        raise ZeroDivisionError


def test_nothing_is_left_after_an_error(links: Links) -> None:
    with pytest.raises(ZeroDivisionError):
        _fail_within(links)
    assert links.name not in _namespaces()


def test_a_command_that_fails_is_named_and_nothing_is_left(links: Links) -> None:
    message = f"`ip netns add {links.name}-switch` failed: Cannot create namespace"
    with shaped(links), pytest.raises(RuntimeError, match=message), shaped(links):
        pass
    assert links.name not in _namespaces()
