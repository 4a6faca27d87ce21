"""The experts' two products forward, each slot's rows with its own matrices.

R rows, D model dim, F hidden dim, s slots, B row tiles, O / I out and in features of one matrix (O = 2F for swiglu's
first). BM, BN: a program's tile of the result; BK: its step in depth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.activation import silu_and_slope, value_and_slope
from swiftmoe_lightning.ops.triton.launch import num_programs, tiles_of
from swiftmoe_lightning.ops.triton.tiles import (
    Rows,
    Tile,
    column_halves,
    dot,
    dot_precision,
    load_block,
    rows_of_tile,
    sources_of,
    tile_of_program,
)


def up(
    x: Tensor, weight_sOD: Tensor, bias_sO: Tensor | None, rows: Rows, activation: str, keep_z: bool
) -> tuple[Tensor | None, Tensor]:
    """act(W @ x), with x [T, D] gathered by `rows.choice_R` on the way in, or [R, D].

    Returns:
        Z [R, O], before the activation and only if asked for, and A [R, F]. Unassigned rows are not written.
    """
    (num_slots, out_features, dim), tile = weight_sOD.shape, rows.tiles.up
    gates = 2 if activation == "swiglu" else 1
    hidden_dim, cols = out_features // gates, tile.cols // gates
    # A gate's matrix and its partner's lie one after the other: a tile is the same columns of both.
    weight = tiles_of(weight_sOD.view(num_slots, gates, hidden_dim, dim), (1, gates, cols, tile.depth))
    z_RO = torch.empty(rows.num_rows, out_features, dtype=x.dtype, device=x.device) if keep_z else None
    a_RF = torch.empty(rows.num_rows, hidden_dim, dtype=x.dtype, device=x.device)
    up_kernel[(len(rows.slot_B) * triton.cdiv(hidden_dim, cols),)](
        x,
        rows.choice_R,
        weight_sOD if weight is None else weight,
        bias_sO,
        rows.slot_B,
        rows.first_row_B,
        rows.ends_s,
        z_RO,
        a_RF,
        num_slots,
        len(rows.slot_B),
        TMA=weight is not None,
        TOP_K=rows.top_k,
        D=dim,
        F=hidden_dim,
        ACTIVATION=activation,
        PRECISION=dot_precision(x.dtype),
        SPLIT=tile.split,
        **tile.arguments(),
    )
    return z_RO, a_RF


def grouped_product(
    x_RI: Tensor, weight: Tensor, bias_sO: Tensor | None, rows: Rows, tile: Tile, transposed: bool = False
) -> Tensor:
    """[R, I] -> [R, O]: W @ x, or its transpose. Unassigned rows are not written.

    Args:
        x_RI: [R, I] floating.
        weight: [s, O, I], or with `transposed` [s, I, O].
        bias_sO: [s, O], added to the slot's rows; None adds nothing.
        rows: whose they are.
        tile: the product's.
        transposed: whether to take the transpose of each slot's matrix.
    """
    out_features = weight.shape[2 if transposed else 1]
    y_RO = torch.empty(rows.num_rows, out_features, dtype=x_RI.dtype, device=x_RI.device)
    max_programs = len(rows.slot_B) * triton.cdiv(out_features, tile.cols)
    x_tiles = tiles_of(x_RI, (tile.rows, tile.depth))
    weight_tiles = tiles_of(weight, (1, tile.depth, tile.cols) if transposed else (1, tile.cols, tile.depth))
    sizes = {"IN": x_RI.shape[1], "OUT": out_features, "TRANSPOSED": transposed}
    where = rows.slot_B, rows.first_row_B, rows.ends_s
    if x_tiles is not None and weight_tiles is not None:
        streamed_kernel[(min(num_programs(x_RI.device, tile.shared), max_programs),)](
            x_tiles, weight_tiles, bias_sO, *where, rows.num_tiles, y_RO, **sizes, **tile.arguments()
        )
    else:
        precision = dot_precision(x_RI.dtype)
        grouped_kernel[(max_programs,)](
            *(x_RI, weight, bias_sO, *where, y_RO, len(rows.ends_s), len(rows.slot_B)),
            **sizes,
            PRECISION=precision,
            **tile.arguments(),
        )
    return y_RO


@triton.jit
def finish_hidden(
    b_z,  # [BM, W], rounded
    rows,  # [BM] int64
    m_row,  # [BM]
    first_col,
    p_z,
    p_a,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    W: tl.constexpr,
):
    """Write W columns of Z and of A in SPLIT parts, a power of two; for an activation without a gate."""
    if SPLIT == 1:
        cols = first_col + tl.arange(0, W)
        at = rows[:, None] * F + cols[None, :]
        mask = m_row[:, None] & (cols < F)[None, :]
        if p_z is not None:
            tl.store(p_z + at, b_z, mask=mask)
        b_a, _ = value_and_slope(b_z.to(tl.float32), ACTIVATION)
        tl.store(p_a + at, b_a.to(p_a.dtype.element_ty), mask=mask)
    else:
        b_left, b_right = column_halves(b_z, BM, W)
        finish_hidden(b_left, rows, m_row, first_col, p_z, p_a, F, ACTIVATION, SPLIT // 2, BM, W // 2)
        finish_hidden(b_right, rows, m_row, first_col + W // 2, p_z, p_a, F, ACTIVATION, SPLIT // 2, BM, W // 2)


@triton.jit
def up_kernel(
    p_x,  # *dtype [T or R, D]
    p_choice,  # *i64 [R], or None
    p_weight,  # *dtype [s, O, D], or if TMA a descriptor of [s, 2 or 1, F, D]
    p_bias,  # *dtype [s, O], or None
    p_slot,  # *i32 [B]
    p_first_row,  # *i32 [B]
    p_ends,  # *i32 [s]
    p_z,  # *dtype [R, O], written, or None
    p_a,  # *dtype [R, F], written
    num_slots,
    num_row_tiles,
    TMA: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """`up` of a tile: BM rows, and BN columns of Z."""
    GATED: tl.constexpr = ACTIVATION == "swiglu"
    OUT: tl.constexpr = 2 * F if GATED else F
    BF: tl.constexpr = BN // 2 if GATED else BN
    MASKED: tl.constexpr = D % BK != 0 or F % BF != 0
    row_tile, col_tile = tile_of_program(tl.program_id(0), num_row_tiles, tl.cdiv(F, BF), GROUP)
    slot = tl.load(p_slot + row_tile)
    if slot >= num_slots:
        return
    # [BM]
    rows, m_row = rows_of_tile(p_first_row, row_tile, tl.load(p_ends + slot), BM)
    sources = sources_of(rows, p_choice, TOP_K)
    # [BN]; gates, then their partners.
    cols = tl.arange(0, BN)
    hidden = col_tile * BF + cols % BF
    weight_rows = hidden + cols // BF * F
    depth = tl.arange(0, BK)
    at_x = p_x + sources[:, None] * D + depth[None, :]
    if not TMA:
        at_weight = p_weight + slot.to(tl.int64) * OUT * D + weight_rows[None, :] * D + depth[:, None]
    b_z = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, D, BK):
        m_k = depth < D - k
        b_x = load_block(at_x + k, m_k[None, :], D % BK != 0)
        if TMA:
            b_weight = p_weight.load([slot, 0, col_tile * BF, k]).reshape(BN, BK).T
        else:
            b_weight = load_block(at_weight + k, m_k[:, None] & (hidden < F)[None, :], MASKED)
        b_z = dot(b_x, b_weight, b_z, PRECISION)
    if p_bias is not None:
        b_z += tl.load(p_bias + slot * OUT + weight_rows, mask=hidden < F, other=0.0).to(tl.float32)[None, :]
    # Backward starts from the rounded Z, so A is of the rounded Z in forward too.
    b_z = b_z.to(p_a.dtype.element_ty)
    first_col = col_tile * BF
    if GATED:
        b_gate, b_up = column_halves(b_z, BM, BN)
        at_a = rows[:, None] * F + first_col + tl.arange(0, BF)[None, :]
        m_a = m_row[:, None] & (first_col + tl.arange(0, BF) < F)[None, :]
        if p_z is not None:
            at_z = at_a + rows[:, None] * F
            tl.store(p_z + at_z, b_gate, mask=m_a)
            tl.store(p_z + at_z + F, b_up, mask=m_a)
        b_silu, _ = silu_and_slope(b_gate.to(tl.float32))
        b_a = b_silu * b_up.to(tl.float32)
        tl.store(p_a + at_a, b_a.to(p_a.dtype.element_ty), mask=m_a)
    else:
        # In column parts, one after the other: all at once, the activation does not fit the registers.
        finish_hidden(b_z, rows, m_row, first_col, p_z, p_a, F, ACTIVATION, SPLIT, BM, BN)


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
