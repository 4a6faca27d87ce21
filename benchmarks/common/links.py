"""Ranks of one machine behind links of a stated speed: nodes are network namespaces, all on one switch.

Only on Linux, for root, with iproute2's `ip` and `tc`. Nothing outside of the namespaces is touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch.distributed as dist

_NEW_NETWORK: Final = 0x40000000
_NAMESPACES: Final = "/run/netns"
_UPLINK: Final = "uplink"
# A token bucket must hold the longest packet that Linux hands to a link (64 KiB), and what a millisecond lets through.
_LEAST_BURST: Final = 128 * 1024
_MAX_NODES: Final = 254
# Of /proc/net/dev, behind the interface's name: bytes received are the first number of a line, bytes sent this one.
_SENT_COLUMN: Final = 8


@dataclass(frozen=True, kw_only=True)
class Links:
    """One full-duplex link a node, to a switch that is never busy. The ranks of a node share its link.

    Attributes:
        num_ranks: W.
        mbit: megabits a second of each link, each way.
        ranks_per_node: neighbouring ranks in one namespace, which talk to each other as fast as the machine lets them.
        name: what names of the namespaces begin with; one run's alone.

    Raises:
        ValueError: for no ranks, no speed, or nodes of different sizes.
    """

    num_ranks: int
    mbit: int
    ranks_per_node: int = 1
    name: str = field(default_factory=lambda: f"swiftmoe-{os.getpid()}")

    def __post_init__(self) -> None:
        if self.ranks_per_node < 1 or self.num_ranks < 1 or self.num_ranks % self.ranks_per_node:
            raise ValueError(
                f"nodes have equally many ranks, 1 or more, got {self.num_ranks} ranks and {self.ranks_per_node} a "
                "node. Choose a number of ranks a node that divides the ranks."
            )
        if self.num_nodes > _MAX_NODES or self.mbit < 1:
            raise ValueError(
                f"links are of 1 to {_MAX_NODES} nodes and of 1 or more megabits a second, got {self.num_nodes} nodes "
                f"and {self.mbit}."
            )

    @property
    def num_nodes(self) -> int:
        """How many namespaces there are, the switch's excepted."""
        return self.num_ranks // self.ranks_per_node

    def making(self) -> list[str]:
        """The commands that make the namespaces and their links, in order."""
        switch = f"{self.name}-switch"
        burst = max(_LEAST_BURST, self.mbit * 10**6 // 8 // 1000)
        bucket = f"root tbf rate {self.mbit}mbit burst {burst} latency 100ms"
        commands = [
            f"ip netns add {switch}",
            f"ip -n {switch} link add switch type bridge",
            f"ip -n {switch} link set switch up",
        ]
        for node in range(self.num_nodes):
            own = f"{self.name}-{node}"
            commands += [
                f"ip netns add {own}",
                f"ip -n {own} link set lo up",
                f"ip -n {switch} link add port{node} type veth peer name {_UPLINK} netns {own}",
                f"ip -n {switch} link set port{node} master switch up",
                f"ip -n {own} address add 10.0.0.{node + 1}/24 dev {_UPLINK}",
                f"ip -n {own} link set {_UPLINK} up",
                # What the node sends is shaped at its own end, what it receives at the switch's.
                f"tc -n {own} qdisc add dev {_UPLINK} {bucket}",
                f"tc -n {switch} qdisc add dev port{node} {bucket}",
            ]
        return commands

    def removal(self) -> list[str]:
        """The commands that remove the namespaces, and with them all links."""
        return [f"ip netns delete {self.name}-{end}" for end in (*range(self.num_nodes), "switch")]

    def join(self, rank: int, timeout_s: int) -> None:
        """On a rank's process, before it has threads or groups: enter its node's namespace, start the default gloo
        group. The environment says how many ranks the node has, as torchrun's does.

        Args:
            rank: of 0..W-1.
            timeout_s: seconds that the group waits in a collective.

        Raises:
            OSError: when the namespace cannot be entered.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        node, local_rank = divmod(rank, self.ranks_per_node)
        with open(f"{_NAMESPACES}/{self.name}-{node}") as namespace:
            if libc.setns(namespace.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"rank {rank} cannot enter its network namespace {namespace.name}")
        os.environ |= {
            "MASTER_ADDR": "10.0.0.1",
            "GLOO_SOCKET_IFNAME": _UPLINK,
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks_per_node),
        }
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


def bytes_sent_by_node() -> int:
    """Bytes that this rank's node has sent over its link so far, by the interface's counter: whole packets, headers and
    acknowledgements included."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    counters = {name.strip(): numbers.split() for name, _, numbers in (line.partition(":") for line in lines)}
    return int(counters[_UPLINK][_SENT_COLUMN])


def missing_for_links() -> str | None:
    """What this machine lacks to shape links, as a sentence; None where nothing is missing."""
    if sys.platform != "linux":
        return f"Links are shaped with Linux's network namespaces, and this is {sys.platform}."
    missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
    if missing:
        return f"Links are shaped with iproute2, and {' and '.join(missing)} cannot be found: install iproute2."
    if os.geteuid():
        return "Links are shaped in network namespaces, which only root makes: run the command as root."
    return None


def make(links: Links) -> None:
    """Make the namespaces and links.

    Args:
        links: which.

    Raises:
        RuntimeError: with the command and what it said, where one fails; those that came before have been done.
    """
    for command in links.making():
        done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"`{command}` failed: {(done.stderr or done.stdout).strip()}")


def remove(links: Links) -> None:
    """Remove the namespaces and links, as many of them as there are.

    Args:
        links: which.
    """
    for command in links.removal():
        # Some are not there when making them failed.
        subprocess.run(command.split(), capture_output=True, check=False)


@contextmanager
def shaped(links: Links) -> Iterator[None]:
    """Inside, the namespaces and links are there; they are removed at the end, also after errors.

    Args:
        links: which.

    Raises:
        RuntimeError: with the command and what it said, where one fails.
    """
    try:
        make(links)
        yield
    finally:
        remove(links)
