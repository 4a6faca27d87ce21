"""The gradient of the router's weights, from its parts.

T tokens, R rows, D model dim, K top-k, s slots, B row tiles, C column tiles of F. BM: rows of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.fused.tiles import RowTiles


def score_gradient(parts: Tensor, rows_TK: Tensor, dtype: torch.dtype, with_bias: bool) -> Tensor:
    """The gradient of the router's weights, zero for an assignment without a row.

    Args:
        parts: [C + 1, R] float32, parts of each row's gradient, as `hidden_gradient` gives them.
        rows_TK: [T, K] int, the row of each assignment, -1 if none.
        dtype: the result's.
        with_bias: whether the last part counts.

    Returns:
        [T, K].
    """
    grad_TK = torch.empty(rows_TK.shape, dtype=dtype, device=rows_TK.device)
    num_parts = len(parts) if with_bias else len(parts) - 1
    grid = (triton.cdiv(rows_TK.numel(), 256),)
    score_gradient_kernel[grid](parts, rows_TK, grad_TK, parts.shape[1], rows_TK.numel(), PARTS=num_parts, BLOCK=256)
    return grad_TK


def bias_part(grad_TD: Tensor, bias_sD: Tensor, tiles: RowTiles, part_R: Tensor) -> None:
    """Write each row's <dO, second bias>, the bias's part of its score's gradient.

    Args:
        grad_TD: [T, D], dO.
        bias_sD: [s, D], the second matrix's.
        tiles: where the rows come from.
        part_R: [R] float32, written.
    """
    bias_part_kernel[(len(tiles.slot_B),)](
        grad_TD,
        tiles.assignment_R,
        bias_sD,
        tiles.slot_B,
        tiles.first_row_B,
        tiles.ends_s,
        part_R,
        len(tiles.ends_s),
        TOP_K=tiles.top_k,
        D=grad_TD.shape[1],
        BM=tiles.sizes.up.rows,
        BK=64,
    )


@triton.jit
def score_gradient_kernel(p_parts, p_rows, p_grad, num_rows, num_assignments, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """`score_gradient` of BLOCK assignments."""
    # [BLOCK]
    assignments = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(p_rows + assignments, mask=assignments < num_assignments, other=-1).to(tl.int64)
    b_grad = tl.zeros([BLOCK], dtype=tl.float32)
    for _ in range(PARTS):
        b_grad += tl.load(p_parts + rows, mask=rows >= 0, other=0.0)
        p_parts += num_rows
    tl.store(p_grad + assignments, b_grad.to(p_grad.dtype.element_ty), mask=assignments < num_assignments)


@triton.jit
def bias_part_kernel(
    p_grad,  # *dtype [T, D]
    p_assignment,  # *i64 [R]
    p_bias,  # *dtype [s, D]
    p_slot,  # *i32 [B]
    p_first_row,  # *i32 [B]
    p_ends,  # *i32 [s]
    p_part,  # *f32 [R], written
    num_slots,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """`bias_part` of a row tile."""
    slot = tl.load(p_slot + tl.program_id(0))
    if slot >= num_slots:
        return
    rows = (tl.load(p_first_row + tl.program_id(0)) + tl.arange(0, BM)).to(tl.int64)
    m_row = rows < tl.load(p_ends + slot)
    tokens = (tl.load(p_assignment + rows, mask=m_row, other=0).to(tl.int32) // TOP_K).to(tl.int64)
    part = tl.zeros([BM], dtype=tl.float32)
    for k in range(0, D, BK):
        depth = k + tl.arange(0, BK)
        # [BM, BK]
        mask = m_row[:, None] & (depth < D)[None, :]
        b_grad = tl.load(p_grad + tokens[:, None] * D + depth[None, :], mask=mask, other=0.0).to(tl.float32)
        b_bias = tl.load(p_bias + slot * D + depth, mask=depth < D, other=0.0).to(tl.float32)
        part += tl.sum(b_grad * b_bias[None, :], 1)
    tl.store(p_part + rows, part, mask=m_row)
