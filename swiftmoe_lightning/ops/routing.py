"""The router's operation: from logits to choices, weights and what the router's losses sum.

T tokens, E experts, K top-k. Built as the operators of `ops.py` are.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftmoe_lightning.config import check_choice
from swiftmoe_lightning.ops import reference
from swiftmoe_lightning.ops.operators import keep_nothing, on_triton, refuse_second_derivative


class Routed(NamedTuple):
    """What `route` returns. Floats are float32 (float64 for float64 logits), and have gradients.

    Attributes:
        weights_TK: [T, K].
        expert_ids_TK: [T, K] int64.
        prob_sums_E: [E], sums over tokens of the scores as shares (for the auxiliary loss).
        counts_E: [E] int64, choices of each expert.
        square_sum: [], sum over tokens of the squared log-sum-exp of the logits (for the z-loss).
    """

    weights_TK: Tensor
    expert_ids_TK: Tensor
    prob_sums_E: Tensor
    counts_E: Tensor
    square_sum: Tensor


def route(logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, renormalize: bool) -> Routed:
    """Choose experts by logits, as `TopKRouter` does, and sum what its losses need.

    Of equal scores the Triton path takes the lower expert id; torch's `topk` may take any. With logits that are not
    finite the ids are some of 0..E-1.

    Args:
        logits_TE: [T, E] floating.
        bias_E: [E], added to the scores for the choice alone, no gradient.
        top_k: K.
        score: "softmax" or "sigmoid".
        renormalize: divide a token's K weights by their sum.

    Raises:
        ValueError: for a score that is not one of `SCORES`, or top_k outside 1..E.
    """
    check_choice("score", score, reference.SCORES)
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"top_k must be in 1..num_experts={logits_TE.shape[1]}, got {top_k}.")
    return Routed(*_route(logits_TE, bias_E, top_k, score, renormalize))


@torch.library.custom_op("swiftmoe::route", mutates_args=())
def _route(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if on_triton(logits_TE):
        from swiftmoe_lightning.ops.triton import router

        return router.route(logits_TE, bias_E, top_k, score, renormalize)
    return reference.route(logits_TE, bias_E, top_k, score, renormalize)


@_route.register_fake
def _(
    logits_TE: Tensor, bias_E: Tensor | None, top_k: int, score: str, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (num_tokens, num_experts), wide = logits_TE.shape, torch.promote_types(logits_TE.dtype, torch.float32)
    return (
        logits_TE.new_empty(num_tokens, top_k, dtype=wide),
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(num_experts, dtype=wide),
        logits_TE.new_empty(num_experts, dtype=torch.int64),
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
    if on_triton(logits_TE):
        from swiftmoe_lightning.ops.triton import router

        return router.route_backward(*inputs)
    return reference.route_backward(*inputs)


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


def _keep_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, _, ctx.score, ctx.renormalize = inputs
    ctx.save_for_backward(logits_TE, output[1])


def _route_gradient(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
    grad_weights_TK, _, grad_probs_E, _, grad_square = grads
    inputs = (grad_weights_TK, grad_probs_E, grad_square, *ctx.saved_tensors)
    return _route_backward(*inputs, ctx.score, ctx.renormalize), None, None, None, None


_route.register_autograd(_route_gradient, setup_context=_keep_choice)
_route_backward.register_autograd(refuse_second_derivative, setup_context=keep_nothing)
