"""A stable counting sort of assignments by group, without a wait for the CPU: in one launch where there are few, and
else in three.

N assignments, G groups, B blocks of assignments. An assignment's row is the number of assignments of lower groups, plus
those of its group in earlier blocks, plus those of its group earlier in its block. Assignments outside 0..G-1 are one
more group, at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.launch import device_of

# Ranking inside a block costs BLOCK comparisons per assignment, and the counts take G * N / BLOCK numbers: 128 keeps
# both small.
BLOCK = 128
# Up to so many assignments each program counts all of them itself, CHUNK at a time, which costs less than two launches.
FEW_ASSIGNMENTS = 8192
CHUNK = 1024


def sort(group_TK: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """([N], [T, K], [G], [G]), all int32: `eager_sort`."""
    num_assignments, device = group_TK.numel(), group_TK.device
    assignment_N = torch.empty(num_assignments, dtype=torch.int32, device=device)
    rows_TK = torch.empty(group_TK.shape, dtype=torch.int32, device=device)
    counts_G, ends_G = (torch.empty(num_groups, dtype=torch.int32, device=device) for _ in range(2))
    if num_assignments == 0:
        return assignment_N, rows_TK, counts_G.zero_(), ends_G.zero_()
    group_TK = group_TK.contiguous()
    num_blocks = triton.cdiv(num_assignments, BLOCK)
    # Two bins more than groups: unassigned ones, and what the last block has beyond N.
    num_bins = triton.next_power_of_2(num_groups + 2)
    outputs, sizes = (assignment_N, rows_TK, counts_G, ends_G), (num_assignments, num_groups)
    if num_assignments <= FEW_ASSIGNMENTS and num_bins <= CHUNK:
        with device_of(group_TK):
            few_kernel[(num_blocks,)](
                group_TK, *outputs, *sizes, BLOCK=BLOCK, CHUNK=CHUNK, NUM_BINS=num_bins, num_warps=4
            )
        return outputs
    num_cells = (num_groups + 1) * num_blocks
    counts_GB, sums_GB = (torch.empty(num_cells, dtype=torch.int32, device=device) for _ in range(2))
    with device_of(group_TK):
        count_kernel[(num_blocks,)](group_TK, counts_GB, *sizes, BLOCK=BLOCK, NUM_BINS=num_bins, num_warps=4)
        torch.cumsum(counts_GB, 0, dtype=torch.int32, out=sums_GB)
        place_kernel[(num_blocks,)](
            group_TK, counts_GB, sums_GB, *outputs, *sizes, BLOCK=BLOCK, NUM_BINS=num_bins, num_warps=4
        )
    return outputs


@triton.jit
def _load_group(p_group, b_i, num_assignments, num_groups):
    """The group of each assignment: G for unassigned, G + 1 beyond N."""
    b_key = tl.load(p_group + b_i, mask=b_i < num_assignments, other=-1)
    b_group = tl.where((b_key >= 0) & (b_key < num_groups), b_key, num_groups).to(tl.int32)
    return tl.where(b_i < num_assignments, b_group, num_groups + 1)


@triton.jit
def _rank_in_block(p_group, b_group, num_assignments, num_groups, BLOCK: tl.constexpr):
    """How many assignments earlier in this program's block are of the same group as each of its own."""
    first = tl.program_id(0) * BLOCK
    b_i = first + tl.arange(0, BLOCK)
    b_rank = tl.zeros([BLOCK], tl.int32)
    # In parts, since a [BLOCK, BLOCK] tile would not fit the registers.
    PART: tl.constexpr = 32
    for start in tl.static_range(0, BLOCK, PART):
        b_j = first + start + tl.arange(0, PART)
        b_other = _load_group(p_group, b_j, num_assignments, num_groups)
        b_earlier = (b_other[None, :] == b_group[:, None]) & (b_j[None, :] < b_i[:, None])
        b_rank += tl.sum(b_earlier.to(tl.int32), axis=1)
    return b_rank


@triton.jit
def few_kernel(
    p_group,  # [N]
    p_assignment,  # [N]
    p_row,  # [N]
    p_counts_out,  # [G]
    p_ends,  # [G]
    num_assignments,
    num_groups,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """All of the sort for a block's assignments, and what the first block writes in `place_kernel`."""
    first = tl.program_id(0) * BLOCK
    b_total = tl.zeros([NUM_BINS], tl.int32)
    b_before = tl.zeros([NUM_BINS], tl.int32)
    for start in range(0, num_assignments, CHUNK):
        b_j = start + tl.arange(0, CHUNK)
        b_other = _load_group(p_group, b_j, num_assignments, num_groups)
        b_total += tl.histogram(b_other, NUM_BINS)
        # From this block on all are in the last bin, which nobody reads.
        b_before += tl.histogram(tl.where(b_j < first, b_other, num_groups + 1), NUM_BINS)
    b_end = tl.cumsum(b_total, 0)
    b_i = first + tl.arange(0, BLOCK)
    m_i = b_i < num_assignments
    b_group = _load_group(p_group, b_i, num_assignments, num_groups)
    b_rank = _rank_in_block(p_group, b_group, num_assignments, num_groups, BLOCK)
    b_place = tl.gather(b_end - b_total + b_before, b_group, 0) + b_rank
    is_assigned = b_group < num_groups
    tl.store(p_assignment + b_place, tl.where(is_assigned, b_i, -1), mask=m_i)
    tl.store(p_row + b_i, tl.where(is_assigned, b_place, -1), mask=m_i)
    if first == 0:
        b_bin = tl.arange(0, NUM_BINS)
        tl.store(p_ends + b_bin, b_end, mask=b_bin < num_groups)
        tl.store(p_counts_out + b_bin, b_total, mask=b_bin < num_groups)


@triton.jit
def count_kernel(
    p_group,  # [N]
    p_counts,  # [G + 1, B]
    num_assignments,
    num_groups,
    BLOCK: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """How many assignments of a block are of each group."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    b_group = _load_group(p_group, block * BLOCK + tl.arange(0, BLOCK), num_assignments, num_groups)
    b_bin = tl.arange(0, NUM_BINS)
    tl.store(p_counts + b_bin * num_blocks + block, tl.histogram(b_group, NUM_BINS), mask=b_bin <= num_groups)


@triton.jit
def place_kernel(
    p_group,  # [N]
    p_counts,  # [G + 1, B]
    p_sums,  # [G + 1, B], inclusive sums of the counts
    p_assignment,  # [N]
    p_row,  # [N]
    p_counts_out,  # [G]
    p_ends,  # [G]
    num_assignments,
    num_groups,
    BLOCK: tl.constexpr,
    NUM_BINS: tl.constexpr,
):
    """The rows of a block's assignments; and, in the first block, each group's rows and where they end."""
    block, num_blocks = tl.program_id(0), tl.num_programs(0)
    b_i = block * BLOCK + tl.arange(0, BLOCK)
    m_i = b_i < num_assignments
    b_group = _load_group(p_group, b_i, num_assignments, num_groups)
    b_rank = _rank_in_block(p_group, b_group, num_assignments, num_groups, BLOCK)
    b_cell = b_group * num_blocks + block
    b_place = tl.load(p_sums + b_cell, mask=m_i, other=0) - tl.load(p_counts + b_cell, mask=m_i, other=0) + b_rank
    is_assigned = b_group < num_groups
    tl.store(p_assignment + b_place, tl.where(is_assigned, b_i, -1), mask=m_i)
    tl.store(p_row + b_i, tl.where(is_assigned, b_place, -1), mask=m_i)
    if block == 0:
        b_bin = tl.arange(0, NUM_BINS)
        m_bin = b_bin < num_groups
        b_end = tl.load(p_sums + (b_bin + 1) * num_blocks - 1, mask=m_bin, other=0)
        b_start = tl.load(p_sums + b_bin * num_blocks - 1, mask=m_bin & (b_bin > 0), other=0)
        tl.store(p_ends + b_bin, b_end, mask=m_bin)
        tl.store(p_counts_out + b_bin, b_end - b_start, mask=m_bin)
