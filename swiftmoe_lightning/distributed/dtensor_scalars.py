"""Scalars of sharded parameters: `p.grad.norm().item()`, `bool(g.isnan().any())`, `loss + p.square().sum()`.

A sum, norm or `any` of a DTensor is a DTensor with one number a rank, which are not reduced yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftmoe_lightning.distributed.dtensor_handlers import by_default, handle

_aten = torch.ops.aten


def handle_scalars() -> None:
    """Reduce scalar DTensors over the ranks where they are read, and where they are combined with a plain tensor.

    torch's own `.item()` (`float`, `bool`, `if`) returns this rank's number; and a loss plus a penalty on weights would
    become a DTensor, as would every gradient in backward. Both are collectives: all ranks must run them.
    """
    handle(_item, _aten._local_scalar_dense.default)
    handle(
        _combine,
        *(getattr(_aten, name).Tensor for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")),
    )


def _item(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (value,) = args
    full: Tensor = value.full_tensor()
    return full.item()


def _combine(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    scalars = [a for a in args[:2] if isinstance(a, DTensor) and a.dim() == 0]
    plain = [a for a in args[:2] if isinstance(a, Tensor) and not isinstance(a, DTensor)]
    if not scalars or not plain or (args[0] is scalars[0] and operator._schema.is_mutable):
        return by_default(operator, args, kwargs)
    return operator(*(a.full_tensor() if isinstance(a, DTensor) else a for a in args), **kwargs)
