"""Moves whole segments of sorted rows in one launch. N assignments, V segments, R rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.launch import device_of

BLOCK = 256


def regroup(rows_TK: Tensor, ends_V: Tensor, shifts_V: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """([R], [T, K]), int32: `eager_regroup`."""
    num_assignments, device = rows_TK.numel(), rows_TK.device
    assignment_R = torch.empty(num_rows, dtype=torch.int32, device=device)
    moved_TK = torch.empty(rows_TK.shape, dtype=torch.int32, device=device)
    if num_assignments == 0:
        return assignment_R, moved_TK
    with device_of(rows_TK):
        regroup_kernel[(triton.cdiv(num_assignments, BLOCK),)](
            rows_TK.contiguous(),
            ends_V,
            shifts_V,
            assignment_R,
            moved_TK,
            num_assignments,
            len(ends_V),
            STEPS=(len(ends_V) - 1).bit_length(),
            BLOCK=BLOCK,
            num_warps=4,
        )
    return assignment_R, moved_TK


@triton.jit
def regroup_kernel(
    p_row,  # [N]
    p_ends,  # [V]
    p_shifts,  # [V]
    p_assignment,  # [R]
    p_moved,  # [N]
    num_assignments,
    num_segments,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The new rows of a block's assignments. Each looks for its segment by bisection, in STEPS halvings."""
    b_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = b_i < num_assignments
    b_row = tl.load(p_row + b_i, mask=m_i, other=-1).to(tl.int32)
    # The first segment that ends behind the row is one of low..high.
    b_low = tl.zeros([BLOCK], tl.int32)
    b_high = b_low + (num_segments - 1)
    for _ in tl.static_range(STEPS):
        b_middle = (b_low + b_high) // 2
        is_before = tl.load(p_ends + b_middle) <= b_row
        b_low = tl.where(is_before, tl.minimum(b_middle + 1, b_high), b_low)
        b_high = tl.where(is_before, b_high, b_middle)
    b_moved = tl.where(b_row >= 0, b_row + tl.load(p_shifts + b_low), -1)
    tl.store(p_moved + b_i, b_moved, mask=m_i)
    tl.store(p_assignment + b_moved, b_i, mask=b_moved >= 0)
