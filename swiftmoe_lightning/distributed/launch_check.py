"""The ranks of a launch meet, compare what they are, and measure their links. Never waits longer than it is told."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist

from swiftmoe_lightning.distributed.group import RankGroup
from swiftmoe_lightning.distributed.launch_facts import RankFacts, own_facts
from swiftmoe_lightning.distributed.launch_findings import Finding, find_problems, hosts_of, ranks_per_host, ranks_text
from swiftmoe_lightning.distributed.node_groups import make_node_groups, measure_speed

_POLL_S: Final = 0.05
# How much longer the others wait for rank 0 than rank 0 for them.
_PATIENCE_S: Final = 5.0


@dataclass(frozen=True)
class LaunchReport:
    """What the ranks found out: but for `rank` the same on all of them.

    Attributes:
        rank: this one.
        ranks: those that came, in order.
        world_size: how many there should be.
        findings: what is wrong.
        speeds: "inside" a host and "between" hosts -> bytes a second that a rank sends while it receives as many, all
            ranks at once; only what was measured.
    """

    rank: int
    ranks: Sequence[RankFacts]
    world_size: int
    findings: Sequence[Finding]
    speeds: dict[str, float]

    @property
    def is_good(self) -> bool:
        """Whether training would start."""
        return not any(finding.is_problem for finding in self.findings)


@contextmanager
def check_launch(timeout_s: float) -> Iterator[LaunchReport]:
    """Meet the other ranks, and say what is wrong with them. Called on every rank; none leaves before rank 0 does.

    Args:
        timeout_s: seconds to wait for ranks, and for an exchange between them.

    Raises:
        ConnectionError: on a rank that cannot reach rank 0's host, or that rank 0 did not answer.
    """
    own = own_facts()
    store = _connect(own, timeout_s)
    ranks = _meet(store, own, timeout_s)
    findings = find_problems(ranks, own.world_size)
    speeds: dict[str, float] = {}
    if len(ranks) > 1 and not any(finding.is_problem for finding in findings):
        speeds, failures = _probe(store, own, ranks, timeout_s)
        findings = [*failures, *findings]
    yield LaunchReport(own.rank, ranks, own.world_size, findings, speeds)
    # The launcher kills all ranks when the first one ends with an error, so rank 0 has told before any of them does. It
    # ends last, for it may hold the store.
    if own.rank == 0:
        store.set("told", "")
        _wait(store, [f"left/{facts.rank}" for facts in ranks if facts.rank], _PATIENCE_S)
    else:
        _wait(store, ["told"], _PATIENCE_S)
        store.set(f"left/{own.rank}", "")


def _connect(own: RankFacts, timeout_s: float) -> dist.Store:
    address, port = own.master_address, int(os.environ["MASTER_PORT"])
    # torchrun's agent has a store there already; otherwise rank 0 makes one.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=own.rank == 0 and not has_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=not has_store,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"rank {own.rank} on {own.host} got no connection to MASTER_ADDR:MASTER_PORT, {address}:{port}, within "
            f"{timeout_s:g} s ({reason}). Start rank 0 on that host, with a port that is free there and that other "
            "hosts can reach (a firewall?)."
        ) from None
    return dist.PrefixStore("swiftmoe/doctor", store)


def _meet(store: dist.Store, own: RankFacts, timeout_s: float) -> list[RankFacts]:
    """The facts of the ranks that came in time, in order. Rank 0 decides which did."""
    store.set(f"facts/{own.rank}", json.dumps(asdict(own)))
    keys = [f"facts/{rank}" for rank in range(own.world_size)]
    if own.rank == 0:
        _wait(store, keys, timeout_s)
        store.set("came", json.dumps([rank for rank, key in enumerate(keys) if store.check([key])]))
    elif not _wait(store, ["came"], timeout_s + _PATIENCE_S):
        others = [rank for rank, key in enumerate(keys) if store.check([key])]
        raise ConnectionError(
            f"rank {own.rank} on {own.host} met {ranks_text(others)}, but rank 0 did not come within {timeout_s:g} s. "
            "Start it, too."
        )
    return [RankFacts(**json.loads(store.get(f"facts/{rank}"))) for rank in json.loads(store.get("came"))]


def _probe(
    store: dist.Store, own: RankFacts, ranks: Sequence[RankFacts], timeout_s: float
) -> tuple[dict[str, float], list[Finding]]:
    """Bytes a second of each kind of link; and what kept ranks from exchanging them."""
    # A timeout is then an error that can be told, and does not end the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    result: dict[str, Any] = {}
    try:
        result["speeds"] = _measure(store, own, ranks, timeout_s)
    except RuntimeError as error:
        result["error"] = str(error).splitlines()[0]
    store.set(f"probed/{own.rank}", json.dumps(result))
    keys = [f"probed/{facts.rank}" for facts in ranks]
    _wait(store, keys, timeout_s + _PATIENCE_S)
    results = {
        facts.rank: json.loads(store.get(key)) for facts, key in zip(ranks, keys, strict=True) if store.check([key])
    }
    errors = {rank: result["error"] for rank, result in results.items() if "error" in result}
    silent = {facts.rank: "no answer" for facts in ranks if facts.rank not in results}
    failures = [
        Finding(
            True,
            f"Rank {rank} could not exchange bytes with the others over {own.backend}: {error}.",
            "Let the hosts reach each other at any port, or name their network with NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO says what NCCL tried.",
        )
        for rank, error in sorted((errors | silent).items())
    ]
    return ({} if failures else results[0]["speeds"]), failures


def _measure(store: dist.Store, own: RankFacts, ranks: Sequence[RankFacts], timeout_s: float) -> dict[str, float]:
    device = torch.device("cpu" if own.gpu is None else f"cuda:{own.local_rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        own.backend,
        store=dist.PrefixStore("probe", store),
        rank=own.rank,
        world_size=own.world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        assert dist.group.WORLD is not None
        everyone = RankGroup(dist.group.WORLD)
        groups = make_node_groups(everyone, ranks_per_host(ranks), device, "two_level")
        if groups is None:
            link = "inside" if len(hosts_of(ranks)) == 1 else "between"
            return {link: measure_speed(everyone, everyone, device)}
        return {
            "inside": measure_speed(groups.node, everyone, device),
            "between": measure_speed(groups.rail, everyone, device),
        }
    finally:
        dist.destroy_process_group()


def _wait(store: dist.Store, keys: list[str], timeout_s: float) -> bool:
    """Whether all keys were set in time."""
    deadline = time.monotonic() + timeout_s
    while not (are_set := store.check(keys)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return are_set
