"""The definition of correct: plain torch versions of the expert layer's operations, on any device and dtype.

T tokens, D model dim, F hidden dim, K top-k, N = T * K token-choices, R rows (surviving choices), s slots,
O / I out and in features of one matrix. A row is one surviving choice; choice t * K + k is token t's k-th.
Sums are taken in float32, or in float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def permute(x_TD: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Copy tokens to rows. choice_R: [R] int64, the choice in each row; rows_TK: [T, K] int64, its inverse, -1 if none.

    Returns [R, D]. Backward sums each token's rows, without atomics.
    """
    return _Permute.apply(x_TD, choice_R, rows_TK)


def combine(y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    """Weighted sum of each token's rows. weights_TK: [T, K]; a choice without a row (-1) adds zero.

    Returns [T, D] in the dtype of `y_RD`.
    """
    return _Combine.apply(y_RD, weights_TK, choice_R, rows_TK)


class _Permute(torch.autograd.Function):
    """Forward: gather tokens into rows. Backward: gather rows back and sum them per token."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(rows_TK)
        return x_TD.index_select(0, choice_R // rows_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (rows_TK,) = ctx.saved_tensors
        return _gather_sum(grad_RD, rows_TK), None, None


class _Combine(torch.autograd.Function):
    """Forward: gather rows and sum them, weighted, per token. Backward: scale and copy the gradient to the rows."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(y_RD, weights_TK, choice_R, rows_TK)
        return _gather_sum(y_RD, rows_TK, weights_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, weights_TK, choice_R, rows_TK = ctx.saved_tensors
        wide = _sum_dtype(y_RD)
        grad_RD = grad_TD.index_select(0, choice_R // rows_TK.shape[1]).to(wide)
        grad_weight_R = (grad_RD * y_RD).sum(-1)
        grad_weights_TK = torch.zeros_like(weights_TK)
        grad_weights_TK.view(-1)[choice_R] = grad_weight_R.to(weights_TK.dtype)
        grad_y_RD = grad_RD * weights_TK.reshape(-1)[choice_R].to(wide).unsqueeze(-1)
        return grad_y_RD.to(y_RD.dtype), grad_weights_TK, None, None


def _gather_sum(y_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """[T, D]: sum over k of y[rows[:, k]], weighted if weights are given."""
    out_TD = torch.zeros(len(rows_TK), y_RD.shape[1], dtype=_sum_dtype(y_RD), device=y_RD.device)
    if len(y_RD) == 0:
        return out_TD.to(y_RD.dtype)
    for k in range(rows_TK.shape[1]):
        rows_T = rows_TK[:, k]
        term_TD = y_RD.index_select(0, rows_T.clamp(min=0)).to(out_TD.dtype)
        if weights_TK is not None:
            term_TD = term_TD * weights_TK[:, k : k + 1].to(out_TD.dtype)
        # A mask, not a zero weight: row 0 stands in for "no row", and 0 * nan is nan.
        out_TD += torch.where(rows_T.unsqueeze(-1) >= 0, term_TD, 0.0)
    return out_TD.to(y_RD.dtype)


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def grouped_linear(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor, bias_sO: Tensor | None = None) -> Tensor:
    """Each slot's matrix times its own rows, one slot after the other.

    ends_s: [s] int32, the end of each slot's rows in `x_RI`; the last one is R.
    Returns [R, O].
    """
    ends = ends_s.tolist()
    parts = x_RI.tensor_split(ends[:-1])
    biases = [None] * len(parts) if bias_sO is None else bias_sO.unbind(0)
    return torch.cat([F.linear(x, w, b) for x, w, b in zip(parts, weight_sOI.unbind(0), biases, strict=True)])
