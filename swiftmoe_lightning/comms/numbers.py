"""Numbers that stock code reads from tensors cut over the ranks: `p.grad.norm().item()`, `bool(g.isnan().any())`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_ITEM = torch.ops.aten._local_scalar_dense.default


@functools.cache
def read_whole_numbers() -> None:
    """For the rest of the process, let `.item()` (and `float`, `bool`, `if`) of a DTensor be of the whole tensor.

    A sum, norm or `any` of a DTensor is one number a rank, still to be reduced, and torch's `.item()` returns this
    rank's. Reduced first, which is a collective: all ranks must read.
    """
    DTensor._op_dispatcher._custom_op_handlers[_ITEM] = _item  # type: ignore[assignment]


def _item(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (value,) = args
    assert isinstance(value, DTensor)
    whole: Tensor = value.full_tensor()
    return whole.item()
