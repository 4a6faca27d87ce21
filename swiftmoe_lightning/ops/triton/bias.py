"""The experts' biases: added to rows, and their gradients.

T tokens, R rows, K top-k, s slots, O out features of one matrix. BM, BN: a program's tile of rows and columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.launch import block_of_program, device_of, launch_by_block


def add_bias(y_RO: Tensor, bias_sO: Tensor, slot_R: Tensor) -> Tensor:
    """Add to each row its slot's bias, and nothing to unassigned rows: [R, O] -> [R, O].

    Args:
        y_RO: [R, O] floating.
        bias_sO: [s, O].
        slot_R: [R] int32, the slot of each row; s for unassigned.
    """
    out_RO = torch.empty(y_RO.shape, dtype=y_RO.dtype, device=y_RO.device)
    if out_RO.numel():
        arguments = (y_RO.contiguous(), bias_sO.contiguous(), slot_R, out_RO, len(bias_sO))
        launch_by_block(add_bias_kernel, out_RO, arguments)
    return out_RO


def bias_gradient(
    grad: Tensor, ends_s: Tensor, scores_TK: Tensor | None = None, assignment_R: Tensor | None = None, top_k: int = 1
) -> Tensor:
    """The sum of each slot's rows of a gradient.

    Args:
        grad: [R, O], or with `scores_TK` [T, O], gathered and weighted.
        ends_s: [s] int32, the end of each slot's rows.
        scores_TK: [T, K], the router's weights.
        assignment_R: [R] int, the assignment in each row; with `scores_TK` only.
        top_k: K.

    Returns:
        [s, O].
    """
    grad_sO = torch.empty(len(ends_s), grad.shape[1], dtype=grad.dtype, device=grad.device)
    with device_of(grad):
        bias_gradient_kernel[(len(ends_s), triton.cdiv(grad.shape[1], 64))](
            grad.contiguous(),
            None if scores_TK is None else assignment_R,
            scores_TK,
            ends_s,
            grad_sO,
            TOP_K=top_k,
            OUT=grad.shape[1],
            BM=128,
            BN=64,
        )
    return grad_sO


@triton.jit
def add_bias_kernel(
    p_y,  # *dtype [R, F]
    p_bias,  # *dtype [s, F]
    p_slot,  # *i32 [R]
    p_out,  # *dtype [R, F], written
    num_slots,
    num_rows,
    F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`add_bias` of a block of rows and columns."""
    b_r, b_f, m = block_of_program(num_rows, F, BLOCK_R, BLOCK_F)
    b_slot = tl.load(p_slot + b_r, mask=b_r < num_rows, other=num_slots).to(tl.int64)
    b_bias = tl.load(p_bias + b_slot * F + b_f, mask=m & (b_slot < num_slots), other=0.0).to(tl.float32)
    b_y = tl.load(p_y + b_r * F + b_f, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + b_r * F + b_f, b_y + b_bias, mask=m)


@triton.jit
def bias_gradient_kernel(
    p_grad,  # *dtype [R, OUT], or [T, OUT] if gathered
    p_assignment,  # *i64 [R], or None
    p_score,  # *f [T, K], or None; gathered only
    p_ends,  # *i32 [s]
    p_out,  # *dtype [s, OUT], written
    TOP_K: tl.constexpr,
    OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """`bias_gradient` of BN columns of a slot."""
    slot = tl.program_id(0)
    start = tl.load(p_ends + slot - 1, mask=slot > 0, other=0)
    end = tl.load(p_ends + slot)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], dtype=tl.float32)
    for first_row in range(start, end, BM):
        rows = (first_row + tl.arange(0, BM)).to(tl.int64)
        m_row = rows < end
        sources = rows
        score = tl.full([BM], 1.0, dtype=tl.float32)
        if p_assignment is not None:
            assignments = tl.load(p_assignment + rows, mask=m_row, other=0)
            sources = (assignments.to(tl.int32) // TOP_K).to(tl.int64)
            score = tl.load(p_score + assignments, mask=m_row, other=0.0).to(tl.float32)
        # [BM, BN]
        mask = m_row[:, None] & (cols < OUT)[None, :]
        b_grad = tl.load(p_grad + sources[:, None] * OUT + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(b_grad * score[:, None], 0)
    tl.store(p_out + slot * OUT + cols, total.to(p_out.dtype.element_ty), mask=cols < OUT)
