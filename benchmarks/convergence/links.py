"""Ranks of one machine behind links of a stated speed: each in a network namespace of its own, all on one switch.

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
from typing import Final

import torch.distributed as dist

_NEW_NETWORK: Final = 0x40000000
_NAMESPACES: Final = "/run/netns"
# A token bucket must hold the longest packet that Linux hands to a link (64 KiB), and what a millisecond lets through.
_LEAST_BURST: Final = 128 * 1024
_MAX_RANKS: Final = 254


@dataclass(frozen=True, kw_only=True)
class Links:
    """One full-duplex link a rank, to a switch that is never busy.

    Attributes:
        num_ranks: W.
        mbit: megabits a second of each link, each way.
        name: what names of the namespaces begin with; one run's alone.
    """

    num_ranks: int
    mbit: int
    name: str = field(default_factory=lambda: f"swiftmoe-{os.getpid()}")

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= _MAX_RANKS or self.mbit < 1:
            raise ValueError(
                f"links are of 1 to {_MAX_RANKS} ranks and of 1 or more megabits a second, got {self.num_ranks} ranks "
                f"and {self.mbit}."
            )

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
        for rank in range(self.num_ranks):
            own = f"{self.name}-{rank}"
            commands += [
                f"ip netns add {own}",
                f"ip -n {own} link set lo up",
                f"ip -n {switch} link add port{rank} type veth peer name uplink netns {own}",
                f"ip -n {switch} link set port{rank} master switch up",
                f"ip -n {own} address add 10.0.0.{rank + 1}/24 dev uplink",
                f"ip -n {own} link set uplink up",
                # What the rank sends is shaped at its own end, what it receives at the switch's.
                f"tc -n {own} qdisc add dev uplink {bucket}",
                f"tc -n {switch} qdisc add dev port{rank} {bucket}",
            ]
        return commands

    def removal(self) -> list[str]:
        """The commands that remove the namespaces, and with them all links."""
        return [f"ip netns delete {self.name}-{end}" for end in (*range(self.num_ranks), "switch")]

    def join(self, rank: int, timeout_s: int) -> None:
        """On a rank's process, before it has threads or groups: enter its namespace, start the default gloo group.

        Args:
            rank: of 0..W-1.
            timeout_s: seconds that the group waits in a collective.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"{_NAMESPACES}/{self.name}-{rank}") as namespace:
            if libc.setns(namespace.fileno(), _NEW_NETWORK):
                raise OSError(ctypes.get_errno(), f"rank {rank} cannot enter its network namespace {namespace.name}")
        os.environ |= {"MASTER_ADDR": "10.0.0.1", "GLOO_SOCKET_IFNAME": "uplink"}
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))


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


@contextmanager
def shaped(links: Links) -> Iterator[None]:
    """Inside, the namespaces and links are there; they are removed at the end, also after errors.

    Args:
        links: which.

    Raises:
        RuntimeError: with the command and what it said, where one fails.
    """
    try:
        for command in links.making():
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"`{command}` failed: {(done.stderr or done.stdout).strip()}")
        yield
    finally:
        for command in links.removal():
            # Some are not there when making them failed.
            subprocess.run(command.split(), capture_output=True, check=False)
