"""What every launch needs: the tensor's device as the current one, and a block width."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def column_block(dim: int, element_size: int, max_block: int = 1024) -> tuple[int, int]:
    """(columns of a program, its warps), so that a thread moves 16 bytes at once.

    dim: columns in all; element_size: bytes of one.
    """
    block = min(triton.next_power_of_2(dim), max_block)
    return block, min(max(block * element_size // (32 * 16), 1), 8)
