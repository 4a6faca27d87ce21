"""What a rank finds out about itself, for `swiftmoe doctor` to compare over the ranks."""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist

_LIBRARIES: Final = ("torch", "lightning", "swiftmoe-lightning")


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank. JSON-able.

    Attributes:
        rank: its number of all.
        local_rank: its number on its host.
        world_size: how many ranks it was told that there are.
        host: the host's name.
        host_address: what the name resolves to there; None if to nothing.
        master_address: what the launcher gave for rank 0's host.
        interfaces: network interfaces that are up, the loopback excepted.
        chosen_interface: of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME; None where neither is set.
        versions: library -> version; None if not installed.
        has_nvidia_driver: whether the host has one, whatever torch sees.
        gpus: UUIDs of the GPUs that torch sees, in its order.
        gpu_name: of the rank's own.
        gpus_out_of_reach: numbers of the GPUs whose memory the rank's own cannot access.
    """

    rank: int
    local_rank: int
    world_size: int
    host: str
    host_address: str | None
    master_address: str
    interfaces: Sequence[str] = ()
    chosen_interface: str | None = None
    versions: Mapping[str, str | None]
    has_nvidia_driver: bool = False
    gpus: Sequence[str] = ()
    gpu_name: str | None = None
    gpus_out_of_reach: Sequence[int] = ()

    @property
    def gpu(self) -> str | None:
        """UUID of the rank's own GPU, which is that of its local rank; None on the CPU, or if there is none for it."""
        return self.gpus[self.local_rank] if self.local_rank < len(self.gpus) else None

    @property
    def backend(self) -> str:
        """Of the process group that a trainer makes."""
        return "nccl" if self.gpus else "gloo"


def is_launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def own_facts() -> RankFacts:
    """This rank, as its environment and torch say."""
    local_rank, num_gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    has_gpu = local_rank < num_gpus
    host = socket.gethostname()
    return RankFacts(
        rank=int(os.environ["RANK"]),
        local_rank=local_rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        host=host,
        host_address=_address_of(host),
        master_address=os.environ["MASTER_ADDR"],
        interfaces=tuple(sorted(name for _, name in socket.if_nameindex() if name != "lo" and _is_up(name))),
        chosen_interface=os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NCCL_SOCKET_IFNAME"),
        versions=_versions(),
        has_nvidia_driver=Path("/proc/driver/nvidia/version").exists(),
        gpus=tuple(str(torch.cuda.get_device_properties(index).uuid) for index in range(num_gpus)),
        gpu_name=torch.cuda.get_device_name(local_rank) if has_gpu else None,
        gpus_out_of_reach=tuple(
            index
            for index in range(num_gpus)
            if has_gpu and index != local_rank and not torch.cuda.can_device_access_peer(local_rank, index)
        ),
    )


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for library in _LIBRARIES:
        versions[library] = None
        with suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    # With the build, such as +cu130, which the installed version need not name.
    versions["torch"] = torch.__version__
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None
    return versions


def _address_of(host: str) -> str | None:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _is_up(interface: str) -> bool:
    """Where the system does not say, as other systems than Linux, it counts as up."""
    try:
        return Path("/sys/class/net", interface, "operstate").read_text().strip() == "up"
    except OSError:
        return True
