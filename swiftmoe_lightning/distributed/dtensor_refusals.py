"""Refuses pickles of, and collectives on, DTensors, which would treat this rank's shard as the whole tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftmoe_lightning.distributed.dtensor_handlers import handle
from swiftmoe_lightning.distributed.expert_group import AXIS, DENSE_AXIS

_COLLECTIVES = (
    "allreduce_",
    "allreduce_coalesced_",
    "broadcast_",
    "reduce_",
    "allgather_",
    "_allgather_base_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "alltoall_base_",
    "gather_",
    "scatter_",
    "send",
)


def refuse_local_parts() -> None:
    """Let pickles (`torch.save`) of sharded parameters, and collectives on any DTensor, raise."""
    DTensor.__reduce_ex__ = _reduce  # type: ignore[assignment]
    handle(_collective, *(getattr(torch.ops.c10d, name).default for name in _COLLECTIVES))


def _reduce(tensor: DTensor, protocol: Any) -> Any:
    if {AXIS, DENSE_AXIS}.isdisjoint(tensor.device_mesh.mesh_dim_names or ()):
        return Tensor.__reduce_ex__(tensor, protocol)
    raise RuntimeError(
        f"a tensor of shape {list(tensor.shape)} is cut over the ranks, and a file of it would hold this rank's "
        f"{list(tensor.to_local().shape)} alone. Gather on all ranks, then save on one: engine.full_state_dict() for "
        "the model, or tensor.full_tensor(). (FAQ: part-of-a-tensor)"
    )


def _collective(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise RuntimeError(
        f"{operator.name()} was called on a tensor that is cut over the ranks, of which each holds rows of its own: "
        "there is nothing to reduce, and nothing to send. Leave experts out (gradients of theirs are averaged "
        "already), or use tensor.full_tensor(). LocalSGD, in which ranks step each for itself, cannot be combined with "
        "spread experts. (FAQ: part-of-a-tensor)"
    )
