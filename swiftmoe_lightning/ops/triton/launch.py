"""What every launch needs: the tensor's device as the current one, block widths, and descriptors of tiles."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def column_block(dim: int, element_size: int, max_block: int = 1024) -> tuple[int, int]:
    """How many columns a program takes, so that a thread moves 16 bytes at once.

    Args:
        dim: columns in all.
        element_size: bytes of one.
        max_block: the most columns of a program.

    Returns:
        (columns of a program, its warps).
    """
    block = min(triton.next_power_of_2(dim), max_block)
    return block, min(max(block * element_size // (32 * 16), 1), 8)


def launch_by_block(kernel: triton.JITFunction, like_RF: Tensor, arguments: tuple[Any, ...], **constants: Any) -> None:
    """Run kernel(*arguments, R, F=...) over blocks of rows and columns: see `block_of_program`.

    Args:
        kernel: takes num_rows, F, BLOCK_R and BLOCK_F behind its own arguments.
        like_RF: what is cut into blocks is as large.
        arguments: the kernel's own.
        **constants: more of its constexprs.
    """
    num_rows, dim = like_RF.shape
    block_f, num_warps = column_block(dim, like_RF.element_size())
    block_r = max(1024 // block_f, 1)
    with device_of(like_RF):
        kernel[(triton.cdiv(num_rows, block_r), triton.cdiv(dim, block_f))](
            *arguments, num_rows, F=dim, BLOCK_R=block_r, BLOCK_F=block_f, num_warps=max(num_warps, 4), **constants
        )


@triton.jit
def block_of_program(num_rows, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """(rows [BLOCK_R, 1], columns [1, BLOCK_F], mask) of this program."""
    b_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    b_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    return b_r, b_f, (b_r < num_rows) & (b_f < F)


def tiles_of(x: Tensor, block: tuple[int, ...]) -> TensorDescriptor | None:
    """For loads of whole tiles by the GPU's copy engine (TMA), which spares a kernel pointers and masks.

    Args:
        x: what is loaded from; what lies outside of it comes as zero.
        block: the shape of a tile.

    Returns:
        A descriptor; None where there is no such engine, or where rows do not begin at 16 bytes.
    """
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(-1) == 1
    is_aligned = is_aligned and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    if x.element_size() != 2 or x.numel() == 0 or not is_aligned or not _has_tma(x.device):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


@functools.cache
def _has_tma(device: torch.device) -> bool:
    """Without a GPU kernels are interpreted, or only compiled: as for an H100."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def num_programs(device: torch.device, shared: int) -> int:
    """How many programs run at a time; without a GPU as on an H100.

    Args:
        device: where they run.
        shared: bytes of shared memory that each takes.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    return processors * max(shared_memory(device) // shared, 1)


def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have; without a GPU as on an H100."""
    if device.type != "cuda":
        return 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))
