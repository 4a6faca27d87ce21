"""The gradient of the values before the activation, Z: the second product's backward.

T tokens, R rows, D model dim, F hidden dim, K top-k, s slots, B row tiles, C column tiles of F. O: columns of Z, 2F for
swiglu. BM, BN: a program's tile of the result; BK: its step in depth.

A row's output is Y, or w * Y where the router's weight w is applied to it later; its incoming gradient is then a gather
of the tokens' dO, and w is applied in here: to dZ, and to A for the second matrix's gradient.
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


def hidden_gradient(
    grad: Tensor, scores_TK: Tensor | None, weight_sDF: Tensor, z_RO: Tensor, tiles: RowTiles, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradient of Z, from dY, or with `scores_TK` from dO, gathered and weighted on the way in.

    Args:
        grad: dY [R, D], or dO [T, D].
        scores_TK: [T, K], the router's weights w.
        weight_sDF: [s, D, F], the second matrix.
        z_RO: [R, O], before the activation.
        tiles: where the rows come from.
        activation: one of `ACTIVATIONS`.

    Returns:
        dZ [R, O], w * A [R, F] (A without scores) and, with scores, [C + 1, R] float32 with a row for the bias: the
        parts of each row's <dO, Y>, which is its score's gradient. Unassigned rows are not written.
    """
    (num_slots, dim, hidden_dim), tile = weight_sDF.shape, tiles.sizes.grad_hidden
    weight = tiles_of(weight_sDF, (1, tile.depth, tile.cols))
    num_col_tiles = triton.cdiv(hidden_dim, tile.cols)
    dz_RO = torch.empty(z_RO.shape, dtype=z_RO.dtype, device=z_RO.device)
    a_RF = torch.empty(tiles.num_rows, hidden_dim, dtype=z_RO.dtype, device=z_RO.device)
    parts = None
    if scores_TK is not None:
        parts = torch.empty(num_col_tiles + 1, tiles.num_rows, dtype=torch.float32, device=grad.device)
    hidden_gradient_kernel[(len(tiles.slot_B) * num_col_tiles,)](
        grad,
        None if scores_TK is None else tiles.assignment_R,
        scores_TK,
        weight_sDF if weight is None else weight,
        z_RO,
        tiles.slot_B,
        tiles.first_row_B,
        tiles.ends_s,
        dz_RO,
        a_RF,
        parts,
        tiles.num_rows,
        num_slots,
        len(tiles.slot_B),
        TMA=weight is not None,
        TOP_K=tiles.top_k,
        D=dim,
        F=hidden_dim,
        ACTIVATION=activation,
        PRECISION=dot_precision(grad.dtype),
        SPLIT=tile.split,
        **tile.arguments(),
    )
    return dz_RO, a_RF, parts


@triton.jit
def finish_columns(
    b_grad,  # [BM, W] float32, the unweighted gradient of A in columns first_col..
    score,  # [BM] float32
    rows,  # [BM] int64
    m_row,  # [BM]
    first_col,
    p_z,
    p_dz,
    p_a,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    W: tl.constexpr,
):
    """Write W columns of dZ and of w * A. Returns [BM], their part of <dA, A>."""
    OUT: tl.constexpr = 2 * F if ACTIVATION == "swiglu" else F
    hidden = first_col + tl.arange(0, W)
    mask = m_row[:, None] & (hidden < F)[None, :]
    z_offsets = rows[:, None] * OUT + hidden[None, :]
    b_z = tl.load(p_z + z_offsets, mask=mask, other=0.0).to(tl.float32)
    # What is done with first is stored first, which frees its registers.
    if ACTIVATION == "swiglu":
        b_up = tl.load(p_z + z_offsets + F, mask=mask, other=0.0).to(tl.float32)
        b_silu, b_slope = silu_and_slope(b_z)
        b_a = b_silu * b_up
        b_slope *= b_up
    else:
        b_a, b_slope = value_and_slope(b_z, ACTIVATION)
    part = tl.sum(b_grad * b_a, 1)
    at_a = p_a + rows[:, None] * F + hidden[None, :]
    tl.store(at_a, (b_a * score[:, None]).to(p_a.dtype.element_ty), mask=mask)
    b_grad *= score[:, None]
    if ACTIVATION == "swiglu":
        tl.store(p_dz + z_offsets + F, (b_grad * b_silu).to(p_dz.dtype.element_ty), mask=mask)
    tl.store(p_dz + z_offsets, (b_grad * b_slope).to(p_dz.dtype.element_ty), mask=mask)
    return part


@triton.jit
def finish_split(
    b_grad,
    score,
    rows,
    m_row,
    first_col,
    p_z,
    p_dz,
    p_a,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    W: tl.constexpr,
):
    """`finish_columns` in SPLIT parts, a power of two."""
    if SPLIT == 1:
        part = finish_columns(b_grad, score, rows, m_row, first_col, p_z, p_dz, p_a, F, ACTIVATION, W)
    else:
        b_left, b_right = column_halves(b_grad, BM, W)
        part = finish_split(
            b_left, score, rows, m_row, first_col, p_z, p_dz, p_a, F, ACTIVATION, SPLIT // 2, BM, W // 2
        )
        part += finish_split(
            b_right, score, rows, m_row, first_col + W // 2, p_z, p_dz, p_a, F, ACTIVATION, SPLIT // 2, BM, W // 2
        )
    return part


@triton.jit
def hidden_gradient_kernel(
    p_grad,  # *dtype [R, D], or [T, D] gathered
    p_assignment,  # *i64 [R], or None
    p_score,  # *f [T, K], or None; gathered only
    p_weight,  # *dtype [s, D, F], or if TMA a descriptor of it
    p_z,  # *dtype [R, O]
    p_slot,  # *i32 [B]
    p_first_row,  # *i32 [B]
    p_ends,  # *i32 [s]
    p_dz,  # *dtype [R, O], written
    p_a,  # *dtype [R, F], written
    p_parts,  # *f32 [C + 1, R], of which C are written, or None
    num_rows,
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
    """`hidden_gradient` of a tile: BM rows, and BN columns of A."""
    MASKED: tl.constexpr = D % BK != 0 or F % BN != 0
    row_tile, col_tile = tile_of_program(tl.program_id(0), num_row_tiles, tl.cdiv(F, BN), GROUP)
    slot = tl.load(p_slot + row_tile)
    if slot >= num_slots:
        return
    # [BM]
    rows, m_row = rows_of_tile(p_first_row, row_tile, tl.load(p_ends + slot), BM)
    sources = sources_of(rows, p_assignment, TOP_K)
    first_col = col_tile * BN
    cols = first_col + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    at_grad = p_grad + sources[:, None] * D + depth[None, :]
    if not TMA:
        at_weight = p_weight + slot.to(tl.int64) * D * F + depth[:, None] * F + cols[None, :]
    b_grad = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, D, BK):
        m_k = depth < D - k
        b_y = load_block(at_grad + k, m_k[None, :], D % BK != 0)
        if TMA:
            b_weight = p_weight.load([slot, k, first_col]).reshape(BK, BN)
        else:
            b_weight = load_block(at_weight, m_k[:, None] & (cols < F)[None, :], MASKED)
            at_weight += BK * F
        b_grad = dot(b_y, b_weight, b_grad, PRECISION)
    score = tl.full([BM], 1.0, dtype=tl.float32)
    if p_score is not None:
        score = tl.load(p_score + tl.load(p_assignment + rows)).to(tl.float32)
    # In column parts, one after the other: all at once they do not fit the registers beside the product.
    part = finish_split(b_grad, score, rows, m_row, first_col, p_z, p_dz, p_a, F, ACTIVATION, SPLIT, BM, BN)
    if p_parts is not None:
        tl.store(p_parts + col_tile.to(tl.int64) * num_rows + rows, part, mask=m_row)
