"""Numbers of tensors cut over the ranks: `p.grad.norm().item()`, `bool(g.isnan().any())`, `loss + p.square().sum()`.

A sum, norm or `any` of a DTensor is one number a rank, still to be reduced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftmoe_lightning.distributed.dtensor_handlers import by_default, handle

_aten = torch.ops.aten


def handle_scalars() -> None:
    """Let numbers be of the whole tensor where they are read, and where they meet a plain tensor.

    `.item()` (`float`, `bool`, `if`) of torch returns this rank's part. A penalty on weights that is added to a loss
    would make a DTensor of it, and of every gradient on the way back. Both are collectives: all ranks must run them.
    """
    handle(_item, _aten._local_scalar_dense.default)
    handle(
        _mix, *(getattr(_aten, name).Tensor for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_"))
    )


def _item(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (value,) = args
    whole: Tensor = value.full_tensor()
    return whole.item()


def _mix(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    numbers = [a for a in args[:2] if isinstance(a, DTensor) and a.dim() == 0]
    plain = [a for a in args[:2] if isinstance(a, Tensor) and not isinstance(a, DTensor)]
    if not numbers or not plain or (args[0] is numbers[0] and operator._schema.is_mutable):
        return by_default(operator, args, kwargs)
    return operator(*(a.full_tensor() if isinstance(a, DTensor) else a for a in args), **kwargs)
