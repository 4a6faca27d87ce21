"""The gradient of an expert's matrix: a product over its rows.

T tokens, R rows, K top-k, s slots. O, I: output and input features of the matrix. BM, BN: a program's tile of the
result; BK: the rows it takes a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.fused.tiles import RowTiles, dot, dot_precision, load_block, tile_of_program


def weight_gradient(left: Tensor, right: Tensor, tiles: RowTiles, gathered: str = "") -> Tensor:
    """The sum of left[row, :, None] * right[row, None, :] over each slot's rows; zero for a slot without.

    Args:
        left: [R, O], or gathered [T, O].
        right: [R, I], or gathered [T, I].
        tiles: where the rows come from.
        gathered: "left" or "right" is [T, ...] and read through `tiles.assignment_R`; the other is [R, ...], by default
            both.

    Returns:
        [s, O, I].
    """
    (out_features, in_features), tile = (left.shape[1], right.shape[1]), tiles.sizes.grad_weight
    grad_sOI = torch.empty(len(tiles.ends_s), out_features, in_features, dtype=left.dtype, device=left.device)
    programs = triton.cdiv(out_features, tile.rows) * triton.cdiv(in_features, tile.cols)
    weight_gradient_kernel[(len(tiles.ends_s) * programs,)](
        left,
        right,
        tiles.assignment_R if gathered == "left" else None,
        tiles.assignment_R if gathered == "right" else None,
        tiles.ends_s,
        grad_sOI,
        TOP_K=tiles.top_k,
        OUT=out_features,
        IN=in_features,
        PRECISION=dot_precision(left.dtype),
        **tile.arguments(),
    )
    return grad_sOI


@triton.jit
def weight_gradient_kernel(
    p_left,  # *dtype [R, OUT], or [T, OUT] gathered
    p_right,  # *dtype [R, IN], or [T, IN] gathered
    p_left_assignment,  # *i64 [R], or None
    p_right_assignment,  # *i64 [R], or None
    p_ends,  # *i32 [s]
    p_grad,  # *dtype [s, OUT, IN], written
    TOP_K: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`weight_gradient` of a tile of a slot: BM rows and BN columns of its matrix."""
    ROW_TILES: tl.constexpr = (OUT + BM - 1) // BM
    COL_TILES: tl.constexpr = (IN + BN - 1) // BN
    slot = tl.program_id(0) // (ROW_TILES * COL_TILES)
    program = tl.program_id(0) % (ROW_TILES * COL_TILES)
    row_tile, col_tile = tile_of_program(program, ROW_TILES, COL_TILES, GROUP)
    start = tl.load(p_ends + slot - 1, mask=slot > 0, other=0)
    end = tl.load(p_ends + slot)
    outs = row_tile * BM + tl.arange(0, BM)
    ins = col_tile * BN + tl.arange(0, BN)
    last = end - (end - start) % BK
    b_grad = tl.zeros([BM, BN], dtype=tl.float32)
    # A slot without rows takes no step, and stores zeros. Whole steps need no mask of rows, which would slow all down.
    for first_row in range(start, last, BK):
        b_left = load_rows(p_left, p_left_assignment, first_row, end, outs, TOP_K, OUT, False, BK, OUT % BM != 0)
        b_right = load_rows(p_right, p_right_assignment, first_row, end, ins, TOP_K, IN, False, BK, IN % BN != 0)
        b_grad = dot(b_left.T, b_right, b_grad, PRECISION)
    if last < end:
        # Masked on both sides: 0 * nan is nan.
        b_left = load_rows(p_left, p_left_assignment, last, end, outs, TOP_K, OUT, True, BK, OUT % BM != 0)
        b_right = load_rows(p_right, p_right_assignment, last, end, ins, TOP_K, IN, True, BK, IN % BN != 0)
        b_grad = dot(b_left.T, b_right, b_grad, PRECISION)
    at_grad = p_grad + slot.to(tl.int64) * OUT * IN + outs[:, None] * IN + ins[None, :]
    tl.store(at_grad, b_grad.to(p_grad.dtype.element_ty), mask=(outs < OUT)[:, None] & (ins < IN)[None, :])


@triton.jit
def load_rows(
    p_rows,
    p_assignment,
    first_row,
    end,
    cols,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTIAL: tl.constexpr,
    BK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[BK, len(cols)] from `first_row` on, gathered gathered. PARTIAL: rows from `end` on are zero. MASKED: columns
    from WIDTH on are."""
    rows = first_row + tl.arange(0, BK)
    if p_assignment is not None:
        assignment = load_block(p_assignment + rows, rows < end, PARTIAL)
        sources = (assignment.to(tl.int32) // TOP_K).to(tl.int64)
    else:
        sources = rows.to(tl.int64)
    mask = (rows < end)[:, None] & (cols < WIDTH)[None, :]
    return load_block(p_rows + sources[:, None] * WIDTH + cols[None, :], mask, PARTIAL or MASKED)
