"""Copies tokens to rows, and sums rows back to tokens.

T tokens, D model dim, K top-k, R rows. `rows` [T, K] holds the row of each assignment, -1 if it has none; `assignment`
[R] is its inverse, -1 where a row is unassigned. A program takes a token, so each token is read once for its K rows.
Where there is no token or row, the mask is of D = 0 columns: Triton 3.9's interpreter cannot broadcast a scalar mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.launch import column_block, device_of


def permute(x_TD: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
    """[R, D]: `eager_permute`."""
    (num_tokens, top_k), num_rows, dim = rows_TK.shape, len(assignment_R), x_TD.shape[1]
    out_RD = torch.empty(num_rows, dim, dtype=x_TD.dtype, device=x_TD.device)
    if out_RD.numel() == 0:
        return out_RD
    block, num_warps = column_block(dim, x_TD.element_size(), max_block=2048)
    grid = (max(num_tokens, triton.cdiv(num_rows, top_k)), triton.cdiv(dim, block))
    with device_of(x_TD):
        permute_kernel[grid](
            x_TD.contiguous(),
            rows_TK.contiguous(),
            assignment_R.contiguous(),
            out_RD,
            num_tokens,
            num_rows,
            D=dim,
            K=top_k,
            BLOCK_D=block,
            num_warps=num_warps,
        )
    return out_RD


def gather_sum(y_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """[T, D]: `eager_gather_sum`."""
    (num_tokens, top_k), dim = rows_TK.shape, y_RD.shape[1]
    out_TD = torch.empty(num_tokens, dim, dtype=y_RD.dtype, device=y_RD.device)
    if out_TD.numel() == 0:
        return out_TD
    block, num_warps = column_block(dim, y_RD.element_size(), max_block=2048)
    with device_of(y_RD):
        gather_sum_kernel[(num_tokens, triton.cdiv(dim, block))](
            y_RD.contiguous(),
            rows_TK.contiguous(),
            None if weights_TK is None else weights_TK.contiguous(),
            out_TD,
            D=dim,
            K=top_k,
            BLOCK_D=block,
            num_warps=num_warps,
        )
    return out_TD


def combine_backward(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """([R, D], [T, K]): `eager_combine_backward`."""
    (num_tokens, top_k), (num_rows, dim) = rows_TK.shape, y_RD.shape
    grad_y_RD = torch.empty(num_rows, dim, dtype=y_RD.dtype, device=y_RD.device)
    grad_weights_TK = torch.empty(num_tokens, top_k, dtype=weights_TK.dtype, device=y_RD.device)
    num_programs = max(num_tokens, triton.cdiv(num_rows, top_k))
    if num_programs == 0:
        return grad_y_RD, grad_weights_TK
    block_k = triton.next_power_of_2(top_k)
    # A program's tile is [BLOCK_K, BLOCK_D] with a float32 sum beside it: 4096 of each fit 128 threads' registers.
    block, _ = column_block(dim, y_RD.element_size(), max_block=max(4096 // block_k, 64))
    with device_of(y_RD):
        combine_backward_kernel[(num_programs,)](
            grad_TD.contiguous(),
            y_RD.contiguous(),
            weights_TK.contiguous(),
            rows_TK.contiguous(),
            assignment_R.contiguous(),
            grad_y_RD,
            grad_weights_TK,
            num_tokens,
            num_rows,
            D=dim,
            K=top_k,
            BLOCK_K=block_k,
            BLOCK_D=block,
            num_warps=4,
        )
    return grad_y_RD, grad_weights_TK


@triton.jit
def permute_kernel(
    p_x,  # [T, D]
    p_rows,  # [T, K]
    p_assignment,  # [R]
    p_out,  # [R, D]
    num_tokens,
    num_rows,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`permute` of BLOCK_D columns of a token."""
    token = tl.program_id(0).to(tl.int64)
    is_token = token < num_tokens
    b_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    # [BLOCK_D]
    b_x = tl.load(p_x + token * D + b_d, mask=b_d < tl.where(is_token, D, 0), other=0.0)
    for k in tl.static_range(K):
        row = tl.load(p_rows + token * K + k, mask=is_token, other=-1).to(tl.int64)
        tl.store(p_out + row * D + b_d, b_x, mask=b_d < tl.where(row >= 0, D, 0))
        # Program t also clears those of the rows t * K + k that are unassigned: no token writes them.
        spare = token * K + k
        is_spare = tl.load(p_assignment + spare, mask=spare < num_rows, other=0) < 0
        tl.store(p_out + spare * D + b_d, tl.zeros_like(b_x), mask=b_d < tl.where(is_spare, D, 0))


@triton.jit
def gather_sum_kernel(
    p_y,  # [R, D]
    p_rows,  # [T, K]
    p_weights,  # [T, K], or None for a plain sum
    p_out,  # [T, D]
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`gather_sum` of BLOCK_D columns of a token."""
    token = tl.program_id(0).to(tl.int64)
    b_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_D], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(p_rows + token * K + k).to(tl.int64)
        # [BLOCK_D]; masked, not weighted by zero: 0 * nan is nan.
        b_y = tl.load(p_y + row * D + b_d, mask=b_d < tl.where(row >= 0, D, 0), other=0.0).to(tl.float32)
        if p_weights is not None:
            b_y *= tl.load(p_weights + token * K + k, mask=row >= 0, other=0.0).to(tl.float32)
        b_sum += b_y
    tl.store(p_out + token * D + b_d, b_sum, mask=b_d < D)


@triton.jit
def combine_backward_kernel(
    p_grad,  # [T, D]
    p_y,  # [R, D]
    p_weights,  # [T, K]
    p_rows,  # [T, K]
    p_assignment,  # [R]
    p_grad_y,  # [R, D]
    p_grad_weights,  # [T, K]
    num_tokens,
    num_rows,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`combine_backward` of a token."""
    token = tl.program_id(0).to(tl.int64)
    num_assignments = tl.where(token < num_tokens, K, 0)
    b_k = tl.arange(0, BLOCK_K)
    # [BLOCK_K]
    b_row = tl.load(p_rows + token * K + b_k, mask=b_k < num_assignments, other=-1).to(tl.int64)
    b_weight = tl.load(p_weights + token * K + b_k, mask=b_row >= 0, other=0.0).to(tl.float32)
    # As in `permute_kernel`: the rows t * K + k that are unassigned.
    b_spare = token * K + b_k
    is_spare = tl.load(p_assignment + b_spare, mask=(b_k < K) & (b_spare < num_rows), other=0) < 0
    # [BLOCK_K, BLOCK_D]
    b_dot = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        b_d = start + tl.arange(0, BLOCK_D)
        m_row = (b_d < D)[None, :] & (b_row >= 0)[:, None]
        b_at = b_row[:, None] * D + b_d[None, :]
        b_grad = tl.load(p_grad + token * D + b_d, mask=b_d < tl.where(token < num_tokens, D, 0), other=0.0)
        b_grad = b_grad.to(tl.float32)[None, :]
        b_y = tl.load(p_y + b_at, mask=m_row, other=0.0).to(tl.float32)
        # Masked again: where there is no row, 0 * an infinite gradient is nan.
        b_dot += tl.where(m_row, b_y * b_grad, 0.0)
        tl.store(p_grad_y + b_at, b_weight[:, None] * b_grad, mask=m_row)
        m_spare = (b_d < D)[None, :] & is_spare[:, None]
        tl.store(p_grad_y + b_spare[:, None] * D + b_d[None, :], tl.zeros_like(b_dot), mask=m_spare)
    tl.store(p_grad_weights + token * K + b_k, tl.sum(b_dot, axis=1), mask=b_k < num_assignments)
