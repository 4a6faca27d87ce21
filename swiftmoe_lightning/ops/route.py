"""The router's operation: from logits to expert ids, weights, and the sums that the router's losses need.

T tokens, E experts, K top-k.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from swiftmoe_lightning.config import check_choice
from swiftmoe_lightning.ops.backend import uses_triton
from swiftmoe_lightning.ops.common import refuse_second_derivative, save_nothing, sum_dtype

SCORES: Final = ("softmax", "sigmoid")
# Least divisor of scores: a token whose scores are all zero has shares of zero, not nan.
_MIN_SUM: Final = 1e-20


class Routing(NamedTuple):
    """What `route` returns. Floats are float32 (float64 for float64 logits), and have gradients.

    Attributes:
        weights_TK: [T, K].
        expert_ids_TK: [T, K] int64.
        prob_sums_E: [E], sums over tokens of the scores as shares (for the auxiliary loss).
        square_sum: [], sum over tokens of the squared log-sum-exp of the logits (for the z-loss).
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    prob_sums_E: Tensor
    square_sum: Tensor


def route(logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, renormalize: bool) -> Routing:
    """Choose each token's experts by logits, and sum over tokens what the router's losses need.

    Of equal scores Triton takes the lower expert id; torch's `topk` may take any. With logits that are not finite the
    ids are arbitrary ones of 0..E-1.

    Args:
        logits_TE: [T, E] floating.
        bias_E: [E], added to the scores to choose experts, not to the weights; it gets no gradient.
        top_k: K.
        score: "softmax" or "sigmoid".
        renormalize: divide a token's K weights by their sum.

    Raises:
        ValueError: for a score that is not one of `SCORES`, or top_k outside 1..E.
    """
    check_choice("score", score, SCORES)
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"top_k must be in 1..num_experts={logits_TE.shape[1]}, got {top_k}.")
    # The last argument is the experts that were chosen before, which routing replay sets.
    return Routing(*_route(logits_TE, bias_E, top_k, score, renormalize, None))


def route_to(logits_TE: Tensor, expert_ids_TK: Tensor, score: str, renormalize: bool) -> Routing:
    """`route` to experts that are chosen already: their weights, and the same sums.

    Args:
        logits_TE: [T, E] floating.
        expert_ids_TK: [T, K] int64, of 0..E-1.
        score: as in `route`.
        renormalize: as in `route`.

    Raises:
        ValueError: for a score that is not one of `SCORES`.
    """
    check_choice("score", score, SCORES)
    wide_TE = logits_TE.to(sum_dtype(logits_TE))
    scores_TE, probs_TE, _ = _scores(wide_TE, score)
    return _routing(wide_TE, scores_TE, probs_TE, expert_ids_TK, renormalize)


def score_logits(logits: Tensor, score: str) -> Tensor:
    """Scores of logits, [..., E] -> [..., E].

    Args:
        logits: floating.
        score: "softmax" over the last dim, or "sigmoid" of each.
    """
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def all_finite(scores: Tensor) -> Tensor:
    """[] bool, whether no score is inf or nan.

    Zero times either is nan, so that a product, a sum and a comparison say it; `isfinite().all()` is twice as many
    kernels.
    """
    return (scores.detach() * 0).sum() == 0


def eager_route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    top_k: int,
    score: str,
    renormalize: bool,
    chosen_TK: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose experts by logits: see `route`.

    Args:
        logits_TE: as in `route`.
        bias_E: as in `route`.
        top_k: as in `route`.
        score: as in `route`.
        renormalize: as in `route`.
        chosen_TK: [T, K] int64, experts to take instead of the best; -1 takes the best.

    Returns:
        (weights [T, K], ids [T, K] int64, sums of probs [E], sum of squared log-sum-exps []).
    """
    wide_TE = logits_TE.to(sum_dtype(logits_TE))
    scores_TE, probs_TE, _ = _scores(wide_TE, score)
    biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
    ids_TK = biased_TE.topk(top_k, dim=-1).indices
    if chosen_TK is not None:
        ids_TK = torch.where(chosen_TK < 0, ids_TK, chosen_TK)
    return _routing(wide_TE, scores_TE, probs_TE, ids_TK, renormalize)


def eager_route_backward(
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
        logits_TE: as in `route`.
        ids_TK: [T, K], the chosen experts.
        score: as in `route`.
        renormalize: as in `route`.
    """
    wide_TE = logits_TE.to(sum_dtype(logits_TE))
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


def _scores(logits_TE: Tensor, score: str) -> tuple[Tensor, Tensor, Tensor]:
    """(scores, scores as shares, the divisor of the shares [T, 1])."""
    scores_TE = score_logits(logits_TE, score)
    if score == "softmax":
        return scores_TE, scores_TE, torch.ones_like(scores_TE[:, :1])
    return scores_TE, *_shares(scores_TE)


def _routing(logits_TE: Tensor, scores_TE: Tensor, probs_TE: Tensor, ids_TK: Tensor, renormalize: bool) -> Routing:
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK, _ = _shares(weights_TK)
    return Routing(weights_TK, ids_TK, probs_TE.sum(0), logits_TE.logsumexp(-1).square().sum())


def _shares(scores: Tensor) -> tuple[Tensor, Tensor]:
    divisor = scores.sum(-1, keepdim=True).clamp(min=_MIN_SUM)
    return scores / divisor, divisor


def _shares_backward(grad: Tensor, shares: Tensor, divisor: Tensor) -> Tensor:
    """The gradient of the scores. Where the divisor is clamped it is a constant, and has no gradient."""
    mean = (grad * shares).sum(-1, keepdim=True).masked_fill(divisor <= _MIN_SUM, 0.0)
    return (grad - mean) / divisor


@torch.library.custom_op("swiftmoe::route", mutates_args=())
def _route(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, renormalize: bool, chosen_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if uses_triton(logits_TE):
        from swiftmoe_lightning.ops.triton import route as kernels

        return kernels.route(logits_TE, bias_E, top_k, score, renormalize, chosen_TK)
    return eager_route(logits_TE, bias_E, top_k, score, renormalize, chosen_TK)


@_route.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, renormalize: bool, chosen_TK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (num_tokens, num_experts), wide = logits_TE.shape, sum_dtype(logits_TE)
    return (
        logits_TE.new_empty(num_tokens, top_k, dtype=wide),
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(num_experts, dtype=wide),
        logits_TE.new_empty((), dtype=wide),
    )


@torch.library.custom_op("swiftmoe::route_backward", mutates_args=())
def _route_backward(
    grad_weights_TK: Tensor,
    grad_probs_E: Tensor,
    grad_square: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    score: str,
    renormalize: bool,
) -> Tensor:
    inputs = (grad_weights_TK, grad_probs_E, grad_square, logits_TE, ids_TK, score, renormalize)
    if uses_triton(logits_TE):
        from swiftmoe_lightning.ops.triton import route as kernels

        return kernels.route_backward(*inputs)
    return eager_route_backward(*inputs)


@_route_backward.register_fake
def _(
    grad_weights_TK: Tensor,
    grad_probs_E: Tensor,
    grad_square: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    score: str,
    renormalize: bool,
) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, _, ctx.score, ctx.renormalize, _ = inputs
    _, ids_TK, _, _ = output
    ctx.save_for_backward(logits_TE, ids_TK)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
    grad_weights_TK, _, grad_probs_E, grad_square = grads
    logits_TE, ids_TK = ctx.saved_tensors
    inputs = (grad_weights_TK, grad_probs_E, grad_square, logits_TE, ids_TK)
    return _route_backward(*inputs, ctx.score, ctx.renormalize), None, None, None, None, None


_route.register_autograd(_backward, setup_context=_save_for_backward)
_route_backward.register_autograd(refuse_second_derivative, setup_context=save_nothing)
