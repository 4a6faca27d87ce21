"""A product of rows with their own slot's matrix, and back: the second of the forward, the last of the backward.

R rows, s slots, B row tiles, O / I out and in features of one matrix. BM, BN: a program's tile of the result; BK: its
step in depth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.fused.tiles import (
    RowTiles,
    Tile,
    dot,
    dot_precision,
    load_block,
    rows_of_tile,
    tile_of_program,
)
from swiftmoe_lightning.ops.triton.launch import num_programs, tiles_of


def grouped_product(
    x_RI: Tensor, weight: Tensor, bias_sO: Tensor | None, tiles: RowTiles, tile: Tile, transposed: bool = False
) -> Tensor:
    """[R, I] -> [R, O]: W @ x, or its transpose. Unassigned rows are not written.

    Args:
        x_RI: [R, I] floating.
        weight: [s, O, I], or with `transposed` [s, I, O].
        bias_sO: [s, O], added to the slot's rows; None adds nothing.
        tiles: of the rows.
        tile: the product's.
        transposed: whether to take the transpose of each slot's matrix.
    """
    out_features = weight.shape[2 if transposed else 1]
    y_RO = torch.empty(tiles.num_rows, out_features, dtype=x_RI.dtype, device=x_RI.device)
    max_programs = len(tiles.slot_B) * triton.cdiv(out_features, tile.cols)
    x_tiles = tiles_of(x_RI, (tile.rows, tile.depth))
    weight_tiles = tiles_of(weight, (1, tile.depth, tile.cols) if transposed else (1, tile.cols, tile.depth))
    sizes = {"IN": x_RI.shape[1], "OUT": out_features, "TRANSPOSED": transposed}
    where = tiles.slot_B, tiles.first_row_B, tiles.ends_s
    if x_tiles is not None and weight_tiles is not None:
        streamed_kernel[(min(num_programs(x_RI.device, tile.shared), max_programs),)](
            x_tiles, weight_tiles, bias_sO, *where, tiles.num_tiles, y_RO, **sizes, **tile.arguments()
        )
    else:
        precision = dot_precision(x_RI.dtype)
        grouped_kernel[(max_programs,)](
            *(x_RI, weight, bias_sO, *where, y_RO, len(tiles.ends_s), len(tiles.slot_B)),
            **sizes,
            PRECISION=precision,
            **tile.arguments(),
        )
    return y_RO


def clear_tail(y_RD: Tensor, ends_s: Tensor) -> Tensor:
    """Zero `y` from the last slot's end on, in place.

    Args:
        y_RD: [R, D], written.
        ends_s: [s] int32, the end of each slot's rows.

    Returns:
        `y_RD`.
    """
    num_rows, dim = y_RD.shape
    if y_RD.numel():
        grid = (triton.cdiv(num_rows, 64), triton.cdiv(dim, 64))
        clear_tail_kernel[grid](y_RD, ends_s, num_rows, len(ends_s), D=dim, BLOCK_R=64, BLOCK_D=64)
    return y_RD


@triton.jit
def grouped_kernel(
    p_x,  # *dtype [R, IN]
    p_weight,  # *dtype [s, OUT, IN], or [s, IN, OUT] if TRANSPOSED
    p_bias,  # *dtype [s, OUT], or None
    p_slot,  # *i32 [B]
    p_first_row,  # *i32 [B]
    p_ends,  # *i32 [s]
    p_y,  # *dtype [R, OUT], written
    num_slots,
    num_row_tiles,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program a tile, for any strides."""
    MASKED: tl.constexpr = IN % BK != 0 or OUT % BN != 0
    row_tile, col_tile = tile_of_program(tl.program_id(0), num_row_tiles, tl.cdiv(OUT, BN), GROUP)
    slot = tl.load(p_slot + row_tile)
    if slot >= num_slots:
        return
    # [BM]
    rows, m_row = rows_of_tile(p_first_row, row_tile, tl.load(p_ends + slot), BM)
    cols = col_tile * BN + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    at_x = p_x + rows[:, None] * IN + depth[None, :]
    at_weight = p_weight + slot.to(tl.int64) * OUT * IN
    if TRANSPOSED:
        at_weight += depth[:, None] * OUT + cols[None, :]
    else:
        at_weight += depth[:, None] + cols[None, :] * IN
    b_y = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, IN, BK):
        m_k = depth < IN - k
        b_x = load_block(at_x + k, m_k[None, :], IN % BK != 0)
        b_weight = load_block(at_weight, m_k[:, None] & (cols < OUT)[None, :], MASKED)
        b_y = dot(b_x, b_weight, b_y, PRECISION)
        at_weight += BK * (OUT if TRANSPOSED else 1)
    finish_product(b_y, p_bias, p_y, slot, rows, m_row, cols, OUT)


@triton.jit
def streamed_kernel(
    x_tiles,  # descriptor of [R, IN]
    weight_tiles,  # descriptor of [s, OUT, IN], or [s, IN, OUT] if TRANSPOSED
    p_bias,  # *dtype [s, OUT], or None
    p_slot,  # *i32 [B]
    p_first_row,  # *i32 [B]
    p_ends,  # *i32 [s]
    p_num_tiles,  # *i32 [1]
    p_y,  # *dtype [R, OUT], written
    IN: tl.constexpr,
    OUT: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program takes tile after tile, and loads for the next one while it stores the last."""
    COL_TILES: tl.constexpr = (OUT + BN - 1) // BN
    num_row_tiles = tl.load(p_num_tiles)
    for program in tl.range(tl.program_id(0), num_row_tiles * COL_TILES, tl.num_programs(0), flatten=True):
        row_tile, col_tile = tile_of_program(program, num_row_tiles, COL_TILES, GROUP)
        slot = tl.load(p_slot + row_tile)
        first_row = tl.load(p_first_row + row_tile)
        b_y = tl.zeros([BM, BN], dtype=tl.float32)
        for k in range(0, IN, BK):
            # Beyond the last feature these are zero. Rows of the next slot are read and not stored.
            b_x = x_tiles.load([first_row, k])
            if TRANSPOSED:
                b_weight = weight_tiles.load([slot, k, col_tile * BN]).reshape(BK, BN)
            else:
                b_weight = weight_tiles.load([slot, col_tile * BN, k]).reshape(BN, BK).T
            b_y = dot(b_x, b_weight, b_y, "tf32")
        rows = first_row + tl.arange(0, BM)
        cols = col_tile * BN + tl.arange(0, BN)
        finish_product(b_y, p_bias, p_y, slot, rows.to(tl.int64), rows < tl.load(p_ends + slot), cols, OUT)


@triton.jit
def finish_product(b_y, p_bias, p_y, slot, rows, m_row, cols, OUT: tl.constexpr):
    """Add the slot's bias, if there is one, and store [BM, BN]."""
    if p_bias is not None:
        b_y += tl.load(p_bias + slot * OUT + cols, mask=cols < OUT, other=0.0).to(tl.float32)[None, :]
    at_y = p_y + rows[:, None] * OUT + cols[None, :]
    tl.store(at_y, b_y.to(p_y.dtype.element_ty), mask=m_row[:, None] & (cols < OUT)[None, :])


@triton.jit
def clear_tail_kernel(
    p_y,  # [R, D]
    p_ends,  # [s]
    num_rows,
    num_slots,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`clear_tail` of a block of rows and columns."""
    b_row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    b_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_tail = (b_row >= tl.load(p_ends + num_slots - 1)) & (b_row < num_rows)
    zeros = tl.zeros([BLOCK_R, BLOCK_D], p_y.dtype.element_ty)
    tl.store(p_y + b_row[:, None] * D + b_d[None, :], zeros, mask=is_tail[:, None] & (b_d < D)[None, :])
