"""Counts writes to DTensors that torch does not count: through `.data`, to `.data`, and by `_foreach` operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftmoe_lightning.distributed.dtensor_handlers import by_default, handle
from swiftmoe_lightning.distributed.sharding import shard_of, sharded_like


def count_writes() -> None:
    """Let every write to a DTensor take effect, and show in its count of writes (`_version`).

    In torch itself, a write through `p.data` does not count, on any tensor; `p.data = value` leaves a DTensor's local
    tensor as it is; and `torch._foreach_lerp_` and its like count on plain tensors, but not on DTensors.
    """
    DTensor.data = property(_read_data, _write_data)  # type: ignore[assignment]
    names = [name for name in dir(torch.ops.aten) if name.startswith("_foreach_") and name.endswith("_")]
    for packet in (getattr(torch.ops.aten, name) for name in names):
        handle(_count, *(getattr(packet, overload) for overload in packet.overloads()))


def _read_data(tensor: DTensor) -> Tensor:
    # `detach()` shares the count of writes; torch's own `.data` has a separate one.
    return tensor.detach()


def _write_data(tensor: DTensor, value: Any) -> None:
    if type(value) is Tensor and value.shape == tensor.shape and _is_cut(tensor):
        value = sharded_like(shard_of(value, tensor).to(tensor.device), tensor)
    if not isinstance(value, DTensor):
        raise TypeError(
            f"`.data` of a tensor of shape {list(tensor.shape)} that is cut over the ranks was given a "
            f"{type(value).__name__}{list(getattr(value, 'shape', []))}. Give it a tensor that is cut alike, or the "
            "whole one."
        )
    Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
    tensor._local_tensor, tensor._spec = value._local_tensor, value._spec
    torch.autograd.graph.increment_version(tensor)


def _is_cut(tensor: DTensor) -> bool:
    return not any(placement.is_partial() for placement in tensor.placements)


def _count(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    written = by_default(operator, args, kwargs)
    torch.autograd.graph.increment_version([tensor for tensor in args[0] if isinstance(tensor, DTensor)])
    return written
