"""The process-group backends of this build of torch."""

from __future__ import annotations

import torch.distributed as dist


def available_backends() -> list[str]:
    """The names of the backends; none where torch is built without `torch.distributed`."""
    if not dist.is_available():
        return []
    checks = {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "mpi": dist.is_mpi_available,
        "ucc": dist.is_ucc_available,
        "xccl": dist.is_xccl_available,
    }
    return [name for name, check in checks.items() if check()]
