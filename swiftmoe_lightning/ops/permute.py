"""Copies tokens to rows, and sums rows back to tokens.

T tokens, D model dim, K top-k, R rows. See `sort.py` for assignments and their rows.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.ops.backend import runs_eagerly, uses_triton
from swiftmoe_lightning.ops.common import choose_gradient, refuse_second_derivative, save_nothing, sum_dtype
from swiftmoe_lightning.ops.sort import SortedAssignments


def permute(x_TD: Tensor, assignments: SortedAssignments) -> Tensor:
    """Copy tokens to rows: [T, D] -> [R, D]; a row that is unassigned is zero.

    Backward sums each token's rows, without atomics.

    Args:
        x_TD: [T, D] floating.
        assignments: which token goes to which row.
    """
    return _copy_rows(x_TD, assignments.assignment_R, assignments.rows_TK)


def unpermute(y_RD: Tensor, assignments: SortedAssignments) -> Tensor:
    """Undo `permute` where K is 1: [R, D] -> [T, D]; a token without a row is zero.

    Args:
        y_RD: [R, D] floating.
        assignments: which token each row is of.
    """
    assert assignments.rows_TK.shape[1] == 1, assignments.rows_TK.shape
    return _copy_rows(y_RD, assignments.rows_TK.flatten(), assignments.assignment_R.unsqueeze(1))


def combine(y_RD: Tensor, weights_TK: Tensor, assignments: SortedAssignments) -> Tensor:
    """Weighted sum of each token's rows: [R, D] -> [T, D], in the dtype of `y_RD`.

    An assignment without a row adds zero.

    Args:
        y_RD: [R, D] floating. Unassigned rows are not read.
        weights_TK: [T, K] floating, of any dtype.
        assignments: which token each row is of.
    """
    assignment_R, rows_TK, _, _ = assignments
    assert weights_TK.shape == rows_TK.shape, (weights_TK.shape, rows_TK.shape)
    assert y_RD.shape[0] == assignment_R.shape[0], (y_RD.shape, assignment_R.shape)
    combine = _EagerCombine.apply if runs_eagerly(y_RD, weights_TK) else _combine
    return combine(y_RD, weights_TK, assignment_R, rows_TK)


def _copy_rows(x_TD: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
    assert x_TD.shape[0] == rows_TK.shape[0], (x_TD.shape, rows_TK.shape)
    permute = _EagerPermute.apply if runs_eagerly(x_TD) else _permute
    return permute(x_TD, assignment_R, rows_TK)


def eager_permute(x_TD: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
    """[R, D]: each row's token, zero in a row that is unassigned. Its backward is `eager_gather_sum`."""
    if len(x_TD) == 0:
        return x_TD.new_zeros(len(assignment_R), x_TD.shape[1])
    token_R = assignment_R.clamp(min=0) // rows_TK.shape[1]
    return _zero_where_(x_TD.index_select(0, token_R), assignment_R < 0)


def eager_gather_sum(y_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """[T, D]: sum over k of y[rows[:, k]], weighted if weights are given. With weights this is `combine`."""
    if _is_bag(y_RD, rows_TK, weights_TK):
        weights_TK = None if weights_TK is None else weights_TK.to(y_RD.dtype)
        return F.embedding_bag(rows_TK, y_RD, per_sample_weights=weights_TK, mode="sum")
    out_TD = torch.zeros(len(rows_TK), y_RD.shape[1], dtype=sum_dtype(y_RD), device=y_RD.device)
    if len(y_RD) == 0:
        return out_TD.to(y_RD.dtype)
    for k in range(rows_TK.shape[1]):
        term_TD = _rows_or_zero(y_RD, rows_TK[:, k]).to(out_TD.dtype)
        if weights_TK is None:
            out_TD += term_TD
        else:
            # A mask, not a zero weight: 0 * nan is nan.
            weight_T = weights_TK[:, k].masked_fill(rows_TK[:, k] < 0, 0.0)
            out_TD.addcmul_(term_TD, weight_T.unsqueeze(-1).to(out_TD.dtype))
    return out_TD.to(y_RD.dtype)


def eager_combine_backward(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `combine`.

    Returns:
        ([R, D] of the rows, [T, K] of the weights): zero for a row that is unassigned, and for an assignment without
        a row.
    """
    if len(y_RD) == 0 or len(grad_TD) == 0:
        return torch.zeros_like(y_RD), torch.zeros_like(weights_TK)
    wide = sum_dtype(y_RD)
    grad_RD = grad_TD.index_select(0, assignment_R.clamp(min=0) // rows_TK.shape[1]).to(wide)
    weight_R = weights_TK.reshape(-1).index_select(0, assignment_R.clamp(min=0)).to(wide)
    grad_weight_R = torch.bmm(grad_RD.unsqueeze(1), y_RD.to(wide).unsqueeze(2)).flatten()
    grad_y_RD = _zero_where_(grad_RD.mul_(weight_R.unsqueeze(-1)), assignment_R < 0)
    grad_weights_TK = _rows_or_zero(grad_weight_R.unsqueeze(-1), rows_TK.reshape(-1)).view(rows_TK.shape)
    return grad_y_RD.to(y_RD.dtype), grad_weights_TK.to(weights_TK.dtype)


def _is_bag(y_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> bool:
    """Whether `F.embedding_bag` computes this: on the CPU it gathers and sums at once, in float32 or wider. It takes
    weights in the rows' dtype only, so weights of a wider one, which it would round, are left out."""
    if y_RD.device.type != "cpu" or rows_TK.numel() == 0 or len(y_RD) == 0:
        return False
    is_exact = weights_TK is None or torch.promote_types(weights_TK.dtype, y_RD.dtype) == y_RD.dtype
    return is_exact and not bool((rows_TK < 0).any())


def _rows_or_zero(y_RD: Tensor, rows_N: Tensor) -> Tensor:
    """[N, D]: y[rows_N], zero for -1. Those read row 0 first; a mask, not a product, zeroes it, for 0 * nan is nan."""
    return _zero_where_(y_RD.index_select(0, rows_N.clamp(min=0)), rows_N < 0)


def _zero_where_(values_ND: Tensor, is_unassigned_N: Tensor) -> Tensor:
    """Zero the unassigned rows, in place. On the CPU it is cheaper to look first whether there are any."""
    if is_unassigned_N.device.type == "cpu" and not is_unassigned_N.any():
        return values_ND
    return values_ND.masked_fill_(is_unassigned_N.unsqueeze(-1), 0.0)


class _EagerPermute(torch.autograd.Function):
    @staticmethod
    def forward(x_TD: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
        return eager_permute(x_TD, assignment_R, rows_TK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, _, rows_TK = inputs
        ctx.save_for_backward(rows_TK)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        gather_sum = choose_gradient(_gather_sum, eager_gather_sum, grad_RD)
        return gather_sum(grad_RD, rows_TK), None, None


class _EagerCombine(torch.autograd.Function):
    @staticmethod
    def forward(y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
        return eager_gather_sum(y_RD, rows_TK, weights_TK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, weights_TK, assignment_R, rows_TK = ctx.saved_tensors
        backward = choose_gradient(_combine_backward, eager_combine_backward, grad_TD, y_RD, weights_TK)
        return *backward(grad_TD, y_RD, weights_TK, assignment_R, rows_TK), None, None


@torch.library.custom_op("swiftmoe::permute", mutates_args=())
def _permute(x_TD: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
    if uses_triton(x_TD):
        from swiftmoe_lightning.ops.triton import permute as kernels

        return kernels.permute(x_TD, assignment_R, rows_TK)
    return eager_permute(x_TD, assignment_R, rows_TK)


@_permute.register_fake
def _(x_TD: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
    return x_TD.new_empty(assignment_R.shape[0], x_TD.shape[1])


@torch.library.custom_op("swiftmoe::gather_sum", mutates_args=())
def _gather_sum(y_RD: Tensor, rows_TK: Tensor) -> Tensor:
    if uses_triton(y_RD):
        from swiftmoe_lightning.ops.triton import permute as kernels

        return kernels.gather_sum(y_RD, rows_TK)
    return eager_gather_sum(y_RD, rows_TK)


@_gather_sum.register_fake
def _(y_RD: Tensor, rows_TK: Tensor) -> Tensor:
    return y_RD.new_empty(rows_TK.shape[0], y_RD.shape[1])


@torch.library.custom_op("swiftmoe::combine", mutates_args=())
def _combine(y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
    if uses_triton(y_RD, weights_TK):
        from swiftmoe_lightning.ops.triton import permute as kernels

        return kernels.gather_sum(y_RD, rows_TK, weights_TK)
    return eager_gather_sum(y_RD, rows_TK, weights_TK)


@_combine.register_fake
def _(y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, rows_TK: Tensor) -> Tensor:
    return y_RD.new_empty(rows_TK.shape[0], y_RD.shape[1])


@torch.library.custom_op("swiftmoe::combine_backward", mutates_args=())
def _combine_backward(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if uses_triton(y_RD, weights_TK):
        from swiftmoe_lightning.ops.triton import permute as kernels

        return kernels.combine_backward(grad_TD, y_RD, weights_TK, assignment_R, rows_TK)
    return eager_combine_backward(grad_TD, y_RD, weights_TK, assignment_R, rows_TK)


@_combine_backward.register_fake
def _(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, assignment_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    return y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)


_permute.register_autograd(_EagerPermute.backward, setup_context=_EagerPermute.setup_context)
_combine.register_autograd(_EagerCombine.backward, setup_context=_EagerCombine.setup_context)
for _operator in (_gather_sum, _combine_backward):
    _operator.register_autograd(refuse_second_derivative, setup_context=save_nothing)
