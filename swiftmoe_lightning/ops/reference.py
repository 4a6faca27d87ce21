"""The definition of correct: plain torch versions of the expert layer's operations, on any device and dtype.

T tokens, D model dim, F hidden dim, E experts, K top-k, N = T * K assignments, G groups of a sort, R rows,
s slots, O / I out and in features of one matrix. A row holds one surviving choice; choice t * K + k is token t's
k-th. `choice_R` [R] and `rows_TK` [T, K] (int32 or int64) are each other's inverse; -1 says that a row is unassigned,
or that a choice has no row. Sums are taken in float32, or in float64 for float64 inputs.

A `..._backward` takes the gradient of the outputs and returns that of the floating inputs; `ops.py` binds the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: Final = ("swiglu", "gelu", "relu2")
# One of these, or a function of rows: [R, 2F] (gated) or [R, F] -> [R, F].
Activation = str | Callable[[Tensor], Tensor]
SCORES: Final = ("softmax", "sigmoid")
# What a sum of scores is at least, when it divides: a token of zero scores has zero shares, not nan.
_MIN_SUM: Final = 1e-20


def sort_choices(key_N: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort choices by group, keeping the order inside one, without a wait for a GPU: see `ops.sort_choices`."""
    is_assigned = (key_N >= 0) & (key_N < num_groups)
    group_N = torch.where(is_assigned, key_N, num_groups).to(torch.int64)
    order_N = torch.argsort(group_N, stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    counts_G = torch.zeros(num_groups + 1, dtype=torch.int64, device=key_N.device)
    counts_G = counts_G.scatter_add_(0, group_N, torch.ones_like(group_N))[:-1]
    choice_N = torch.where(is_assigned[order_N], order_N, -1)
    row_N = torch.where(is_assigned, place_N, -1)
    return choice_N.int(), row_N.int(), counts_G.int(), counts_G.cumsum(0).int()


def permute(x_TD: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    """[R, D]: each row's token, zero in a row that is unassigned. Its backward is `gather_sum`."""
    if len(x_TD) == 0:
        return x_TD.new_zeros(len(choice_R), x_TD.shape[1])
    token_R = choice_R.clamp(min=0) // rows_TK.shape[1]
    return _zero_where_(x_TD.index_select(0, token_R), choice_R < 0)


def gather_sum(y_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """[T, D]: sum over k of y[rows[:, k]], weighted if weights are given. With weights this is combine."""
    if _is_bag(y_RD, rows_TK, weights_TK):
        weights_TK = None if weights_TK is None else weights_TK.to(y_RD.dtype)
        return F.embedding_bag(rows_TK, y_RD, per_sample_weights=weights_TK, mode="sum")
    out_TD = torch.zeros(len(rows_TK), y_RD.shape[1], dtype=_sum_dtype(y_RD), device=y_RD.device)
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


def combine(y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor) -> Tensor:
    """[T, D]: each token's rows, weighted, in one sum."""
    return gather_sum(y_RD, rows_TK, weights_TK)


def combine_backward(
    grad_TD: Tensor, y_RD: Tensor, weights_TK: Tensor, choice_R: Tensor, rows_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `combine`.

    Returns:
        ([R, D] of the rows, [T, K] of the weights): zero for a row that is unassigned and a choice without a row.
    """
    if len(y_RD) == 0 or len(grad_TD) == 0:
        return torch.zeros_like(y_RD), torch.zeros_like(weights_TK)
    wide = _sum_dtype(y_RD)
    grad_RD = grad_TD.index_select(0, choice_R.clamp(min=0) // rows_TK.shape[1]).to(wide)
    weight_R = weights_TK.reshape(-1).index_select(0, choice_R.clamp(min=0)).to(wide)
    grad_weight_R = torch.bmm(grad_RD.unsqueeze(1), y_RD.to(wide).unsqueeze(2)).flatten()
    grad_y_RD = _zero_where_(grad_RD.mul_(weight_R.unsqueeze(-1)), choice_R < 0)
    grad_weights_TK = _rows_or_zero(grad_weight_R.unsqueeze(-1), rows_TK.reshape(-1)).view(rows_TK.shape)
    return grad_y_RD.to(y_RD.dtype), grad_weights_TK.to(weights_TK.dtype)


def activate(z_RF: Tensor, activation: str) -> Tensor:
    """[R, F]: silu(gate) * up of z [R, 2F], the gate's half first (swiglu); else gelu (exact) or relu**2 of [R, F]."""
    wide_RF = z_RF.to(_sum_dtype(z_RF))
    if activation == "swiglu":
        gate_RF, up_RF = wide_RF.chunk(2, dim=-1)
        out_RF = F.silu(gate_RF) * up_RF
    else:
        out_RF = F.gelu(wide_RF) if activation == "gelu" else F.relu(wide_RF).square()
    return out_RF.to(z_RF.dtype)


def activate_backward(grad_RF: Tensor, z_RF: Tensor, activation: str) -> Tensor:
    """The gradient of z, in its shape.

    Args:
        grad_RF: [R, F], of the output.
        z_RF: what `activate` took.
        activation: one of `ACTIVATIONS`.
    """
    wide_RF, grad_RF = z_RF.to(_sum_dtype(z_RF)), grad_RF.to(_sum_dtype(z_RF))
    if activation == "swiglu":
        gate_RF, up_RF = wide_RF.chunk(2, dim=-1)
        out_RF = torch.empty_like(wide_RF)
        grad_gate_RF, grad_up_RF = out_RF.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad_RF * up_RF, gate_RF, grad_input=grad_gate_RF)
        torch.mul(grad_RF, F.silu(gate_RF), out=grad_up_RF)
        return out_RF.to(z_RF.dtype)
    if activation == "gelu":
        below_RF = 0.5 * (1 + torch.erf(wide_RF * 0.5**0.5))
        density_RF = torch.exp(-0.5 * wide_RF.square()) * (2 * torch.pi) ** -0.5
        return (grad_RF * (below_RF + wide_RF * density_RF)).to(z_RF.dtype)
    return (grad_RF * 2 * F.relu(wide_RF)).to(z_RF.dtype)


def route(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose experts by logits: see `routing.route`.

    Returns:
        (weights [T, K], ids [T, K] int64, sums of probs [E], counts [E] int64, sum of squared log-sum-exps []).
    """
    wide_TE = logits_TE.to(_sum_dtype(logits_TE))
    scores_TE, probs_TE, _ = _scores(wide_TE, score)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    ids_TK = choice_TE.topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK, _ = _shares(weights_TK)
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
    counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK.flatten()))
    return weights_TK, ids_TK, probs_TE.sum(0), counts_E, wide_TE.logsumexp(-1).square().sum()


def route_backward(
    grad_weights_TK: Tensor,
    grad_probs_E: Tensor,
    grad_square: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    score: str,
    renormalize: bool,
) -> Tensor:
    """The gradient of the logits, [T, E].

    Args:
        grad_weights_TK: [T, K], of the weights.
        grad_probs_E: [E], of the sums of probs.
        grad_square: [], of the sum of squares.
        logits_TE: what `route` took.
        ids_TK: what it chose.
        score: one of `SCORES`.
        renormalize: as `route` took it.
    """
    wide_TE = logits_TE.to(_sum_dtype(logits_TE))
    scores_TE, probs_TE, sum_T1 = _scores(wide_TE, score)
    if renormalize:
        raw_TK = scores_TE.gather(-1, ids_TK)
        weights_TK, divisor_T1 = _shares(raw_TK)
        grad_weights_TK = _shares_backward(grad_weights_TK, weights_TK, divisor_T1)
    grad_TE = torch.zeros_like(wide_TE).scatter_(-1, ids_TK, grad_weights_TK.to(wide_TE.dtype))
    softmax_TE = wide_TE.softmax(-1)
    if score == "softmax":
        grad_TE += grad_probs_E
        grad_TE = softmax_TE * (grad_TE - (grad_TE * softmax_TE).sum(-1, keepdim=True))
    else:
        grad_TE += _shares_backward(grad_probs_E.expand_as(probs_TE), probs_TE, sum_T1)
        grad_TE = grad_TE * scores_TE * (1 - scores_TE)
    grad_TE += 2 * grad_square * wide_TE.logsumexp(-1, keepdim=True) * softmax_TE
    return grad_TE.to(logits_TE.dtype)


def grouped_linear(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> Tensor:
    """Each slot's matrix times its own rows, one slot after the other.

    Args:
        x_RI: [R, I], sorted by slot.
        weight_sOI: [s, O, I].
        ends_s: [s] int32, the end of each slot's rows in `x_RI`.

    Returns:
        [R, O], zero behind the last end.
    """
    parts = [F.linear(x, w) for x, w in zip(_by_slot(x_RI, ends_s), weight_sOI.unbind(0), strict=True)]
    return _filled(parts, len(x_RI))


def grouped_linear_backward(grad_RO: Tensor, x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the rows, [R, I], and of the matrices, [s, O, I]."""
    grads, parts = _by_slot(grad_RO, ends_s), _by_slot(x_RI, ends_s)
    grad_x_RI = _filled([g @ w for g, w in zip(grads, weight_sOI.unbind(0), strict=True)], len(x_RI))
    return grad_x_RI, torch.stack([g.T @ x for g, x in zip(grads, parts, strict=True)])


def add_bias(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    """Each row with its own slot's bias; behind the last end with any. Its bias's backward is `slot_sums`."""
    if len(y_RO) == 0:
        return torch.empty_like(y_RO)
    slot_R = slots_of(ends_s, len(y_RO)).clamp(max=len(ends_s) - 1)
    return bias_sO.index_select(0, slot_R).add_(y_RO)


def slot_sums(rows_RO: Tensor, ends_s: Tensor) -> Tensor:
    """[s, O]: the sum of each slot's rows, without a wait for a GPU."""
    if len(rows_RO) == 0:
        return rows_RO.new_zeros(len(ends_s), rows_RO.shape[1])
    row_R = torch.arange(len(rows_RO), device=rows_RO.device)
    # One bag more, for unassigned rows.
    return F.embedding_bag(row_R, rows_RO, F.pad(ends_s.to(torch.int64), (1, 0)), mode="sum")[:-1]


def slots_of(ends_s: Tensor, num_rows: int) -> Tensor:
    """The slot of each row.

    Args:
        ends_s: [s] int32, the end of each slot's rows.
        num_rows: R.

    Returns:
        [R] int32; s for unassigned.
    """
    rows_R = torch.arange(num_rows, device=ends_s.device, dtype=torch.int32)
    return torch.searchsorted(ends_s, rows_R, right=True, out_int32=True)


def _by_slot(rows_R: Tensor, ends_s: Tensor) -> tuple[Tensor, ...]:
    ends = ends_s.tolist()
    return rows_R[: ends[-1]].tensor_split(ends[:-1])


def _filled(parts: list[Tensor], num_rows: int) -> Tensor:
    """One tensor of the parts, and zero behind them."""
    missing = num_rows - sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_zeros(missing, parts[0].shape[1])])


def _is_bag(y_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None) -> bool:
    """Whether `F.embedding_bag` takes these: a CPU's fused gather and sum, which sums in float32 or wider. It wants
    weights in the dtype of the rows, to which wider ones are not rounded."""
    if y_RD.device.type != "cpu" or rows_TK.numel() == 0 or len(y_RD) == 0:
        return False
    is_exact = weights_TK is None or torch.promote_types(weights_TK.dtype, y_RD.dtype) == y_RD.dtype
    return is_exact and not bool((rows_TK < 0).any())


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _rows_or_zero(y_RD: Tensor, rows_N: Tensor) -> Tensor:
    """[N, D]: the named rows, zero for -1. Row 0 stands in for those, so its values must not leak: a mask."""
    return _zero_where_(y_RD.index_select(0, rows_N.clamp(min=0)), rows_N < 0)


def _zero_where_(values_ND: Tensor, is_unassigned_N: Tensor) -> Tensor:
    """In place. On a CPU, to look whether there is anything to do is cheaper than to do it."""
    if is_unassigned_N.device.type == "cpu" and not is_unassigned_N.any():
        return values_ND
    return values_ND.masked_fill_(is_unassigned_N.unsqueeze(-1), 0.0)


def _scores(logits_TE: Tensor, score: str) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, scores as shares, what divided them [T, 1])."""
    if score == "softmax":
        scores_TE = logits_TE.softmax(-1)
        return scores_TE, scores_TE, torch.ones_like(scores_TE[:, :1])
    scores_TE = logits_TE.sigmoid()
    return scores_TE, *_shares(scores_TE)


def _shares(scores: Tensor) -> tuple[Tensor, Tensor]:
    divisor = scores.sum(-1, keepdim=True).clamp(min=_MIN_SUM)
    return scores / divisor, divisor


def _shares_backward(grad: Tensor, shares: Tensor, divisor: Tensor) -> Tensor:
    """At the clamp the divisor is a constant, or nearly: then the shares' sum is no more than what rounding leaves."""
    mean = (grad * shares).sum(-1, keepdim=True).masked_fill(divisor <= _MIN_SUM, 0.0)
    return (grad - mean) / divisor
