"""The experts' first product with its activation, each slot's rows with its own matrices.

T tokens, R rows, D model dim, F hidden dim, s slots, B row tiles, O out features (2F for swiglu). BM, BN: a program's
tile of the result; BK: its step in depth.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.activation import silu_and_slope, value_and_slope
from swiftmoe_lightning.ops.triton.fused.tiles import (
    RowTiles,
    column_halves,
    dot,
    dot_precision,
    load_block,
    rows_of_tile,
    sources_of,
    tile_of_program,
)
from swiftmoe_lightning.ops.triton.launch import tiles_of


def up(
    x_TD: Tensor, weight_sOD: Tensor, bias_sO: Tensor | None, tiles: RowTiles, activation: str, keep_z: bool
) -> tuple[Tensor | None, Tensor]:
    """act(W @ x), with x [T, D] gathered by `tiles.assignment_R` on the way in.

    Returns:
        Z [R, O], before the activation and only if asked for, and A [R, F]. Unassigned rows are not written.
    """
    (num_slots, out_features, dim), tile = weight_sOD.shape, tiles.sizes.up
    gates = 2 if activation == "swiglu" else 1
    hidden_dim, cols = out_features // gates, tile.cols // gates
    # A gate's matrix and its partner's lie one after the other: a tile is the same columns of both.
    weight = tiles_of(weight_sOD.view(num_slots, gates, hidden_dim, dim), (1, gates, cols, tile.depth))
    z_RO = torch.empty(tiles.num_rows, out_features, dtype=x_TD.dtype, device=x_TD.device) if keep_z else None
    a_RF = torch.empty(tiles.num_rows, hidden_dim, dtype=x_TD.dtype, device=x_TD.device)
    up_kernel[(len(tiles.slot_B) * triton.cdiv(hidden_dim, cols),)](
        x_TD,
        tiles.assignment_R,
        weight_sOD if weight is None else weight,
        bias_sO,
        tiles.slot_B,
        tiles.first_row_B,
        tiles.ends_s,
        z_RO,
        a_RF,
        num_slots,
        len(tiles.slot_B),
        TMA=weight is not None,
        TOP_K=tiles.top_k,
        D=dim,
        F=hidden_dim,
        ACTIVATION=activation,
        PRECISION=dot_precision(x_TD.dtype),
        SPLIT=tile.split,
        **tile.arguments(),
    )
    return z_RO, a_RF


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
    p_x,  # *dtype [T, D]
    p_assignment,  # *i64 [R]
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
    sources = sources_of(rows, p_assignment, TOP_K)
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
