"""The router, which chooses each token's top-k experts, and the losses that balance the experts.

T tokens, D model dim, E experts, K top-k.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftmoe_lightning.config import check_choice, check_coefficient, check_whole
from swiftmoe_lightning.distributed import to_device
from swiftmoe_lightning.ops import SCORES, Routing, route, route_to

# Forwards in training without an update of the bias, after which a warning follows. Accumulations have fewer.
_FORWARDS_BEFORE_WARNING: Final = 1000


@dataclass(frozen=True, eq=False)
class RouterOutput:
    """What a router returns, also one of your own.

    Attributes:
        expert_ids_TK: [T, K] int64, different experts for each token; -1 is unassigned.
        weights_TK: [T, K] floating, the weight of each assignment in its token's sum.
        logits_TE: [T, E] floating, raw scores (for the z-loss and the check for non-finite scores).
        probs_TE: [T, E] floating, scores as shares that sum to 1 over E (for the auxiliary loss); or None, with
        prob_sums_E: [E] floating, `probs_TE` summed over T, which is all that the loss needs. `TopKRouter` gives these.
        square_sum: [] floating, the squared log-sum-exp of `logits_TE` summed over T (for the z-loss); None computes
            it.
        mean_experts: the mean number of experts of a token, by which losses tell tokens from assignments; None is K.
            Give it where ids are unassigned.
        num_groups: above 1, the auxiliary loss balances the experts inside each of so many equal groups of them, and
            not the groups; each token's probabilities are of one group.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    probs_TE: Tensor | None = None
    prob_sums_E: Tensor | None = None
    square_sum: Tensor | None = None
    mean_experts: float | None = None
    num_groups: int = 1

    @property
    def experts_per_token(self) -> float:
        """`mean_experts`, or K."""
        return self.expert_ids_TK.shape[1] if self.mean_experts is None else self.mean_experts

    def load_balancing_loss(self, popularity_E: Tensor, num_data_ranks: float) -> Tensor:
        """See `load_balancing_loss`.

        Raises:
            ValueError: when the router gave neither `probs_TE` nor `prob_sums_E`.
        """
        probs_TE = self.probs_TE if self.prob_sums_E is None else self.prob_sums_E.unsqueeze(0)
        if probs_TE is None:
            raise ValueError(
                "aux_loss_coef needs a RouterOutput with probs_TE or prob_sums_E: the router gave neither."
            )
        return load_balancing_loss(probs_TE, popularity_E, num_data_ranks, self.experts_per_token, self.num_groups)

    def z_loss(self, num_tokens: Tensor, num_data_ranks: float) -> Tensor:
        """See `z_loss`."""
        if self.square_sum is None:
            return z_loss(self.logits_TE, num_tokens, num_data_ranks)
        return self.square_sum * num_data_ranks / num_tokens.clamp(min=1)


class TopKRouter(nn.Module):
    """Linear scores in float32, the K best experts of each token, their scores as weights.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, how many experts each token chooses.
        score: "softmax" over the experts, or "sigmoid" of each.
        renormalize: divide a token's K weights by their sum; None does so for K > 1. (With K = 1 every weight would be
            1, and the router would learn nothing from the task.)
        bias_update_rate: above 0, an `expert_bias` [E] is added to the scores to choose experts (not to the
            weights), and every optimizer step moves it by this much towards less popular experts: balance without an
            auxiliary loss (arXiv 2408.15664). The engine calls `update_bias`. A warning follows if it has not been
            called in the first thousand training forwards (compiled ones do not count).
        device: of the weight and the bias.
        dtype: of the weight; the bias is float32.

    Raises:
        ValueError: if top_k is not in 1..E, for a size below 1, an unknown score, for renormalize=True with top_k=1,
            or a bias_update_rate that is not a number of 0 or more.
    """

    expert_bias: Tensor | None

    def __init__(  # noqa: PLR0913 - public options
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool | None = None,
        bias_update_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole(dim=dim, num_experts=num_experts)
        check_choice("score", score, SCORES)
        check_coefficient(bias_update_rate=bias_update_rate)
        if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in 1..num_experts={num_experts}, got {top_k!r}.")
        if renormalize and top_k == 1:
            raise ValueError(
                "renormalize=True with top_k=1 makes every weight 1, and the router learns nothing from the task. "
                "Leave renormalize unset, or choose top_k=2 or more."
            )
        self.top_k, self.score, self.bias_update_rate = top_k, score, bias_update_rate
        # Counts down; None once the bias was updated or the warning given.
        self._forwards_before_warning: int | None = _FORWARDS_BEFORE_WARNING
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if bias_update_rate else None
        self.register_buffer("expert_bias", bias)
        if not self.weight.is_meta:
            self.reset_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Casts leave the bias in float32: its steps are small, and bfloat16 would round them away."""
        previous = self.expert_bias
        super()._apply(fn, recurse)
        if previous is not None and self.expert_bias is not None and self.expert_bias.dtype != previous.dtype:
            self.expert_bias = previous.to(self.expert_bias.device)
        return self

    def reset_parameters(self) -> None:
        """Weights from N(0, 0.02), the bias to zero."""
        nn.init.normal_(self.weight, std=0.02)
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def forward(
        self, x_TD: Tensor, token_ids_T: Tensor | None = None, cluster_ids_T: Tensor | None = None
    ) -> RouterOutput:
        """[T, D] -> the experts of each token. Scores are computed in float32 (float64 for float64 weights).

        Args:
            x_TD: [T, D] floating.
            token_ids_T: [T] int, for a router that chooses by them; others ignore them.
            cluster_ids_T: [T] int, likewise.
        """
        if self.expert_bias is not None and self.training and torch.is_grad_enabled():
            self._warn_without_updates()
        return self.choose(self.logits(x_TD), token_ids_T)

    def logits(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, E] float32 (float64 for float64 weights)."""
        return wide_linear(x_TD, self.weight)

    def choose(self, logits_TE: Tensor, token_ids_T: Tensor | None) -> RouterOutput:
        """The experts of each token. Subclasses choose by another rule.

        Args:
            logits_TE: [T, E], what `logits` returned.
            token_ids_T: as in `forward`.
        """
        routed = route(logits_TE, self.expert_bias, self.top_k, self.score, self.renormalize)
        return _output(routed, logits_TE)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> RouterOutput:
        """Route to experts that are chosen already: their weights, and what the losses need.

        Args:
            logits_TE: [T, E], what `logits` returned.
            expert_ids_TK: [T, K] int64, of 0..E-1.
        """
        return _output(route_to(logits_TE, expert_ids_TK, self.score, self.renormalize), logits_TE)

    def _warn_without_updates(self) -> None:
        # A counter that changes in every forward would make torch.compile recompile each time.
        if torch.compiler.is_compiling() or self._forwards_before_warning is None:
            return
        self._forwards_before_warning -= 1
        if self._forwards_before_warning == 0:
            self._forwards_before_warning = None
            warnings.warn(
                f"{type(self).__name__}(bias_update_rate={self.bias_update_rate}) has trained for "
                f"{_FORWARDS_BEFORE_WARNING} forwards, and nobody has updated its bias, so nothing balances the "
                "experts. An engine does, on one device, too (a strategy has one); or "
                "call router.update_bias(popularity) after every optimizer step. (FAQ: idle-router-bias)",
                stacklevel=3,
            )

    @torch.no_grad()
    def update_bias(self, popularity_E: np.ndarray) -> None:
        """Move `expert_bias` towards experts with less than the mean popularity.

        Args:
            popularity_E: [E], of one step.
        """
        self._forwards_before_warning = None
        if self.expert_bias is not None:
            sign_E = np.sign(popularity_E.mean() - popularity_E, dtype=np.float32)
            (sign_on_device_E,) = to_device(self.expert_bias.device, sign_E)
            self.expert_bias += self.bias_update_rate * sign_on_device_E


def load_balancing_loss(
    probs_TE: Tensor, popularity_E: Tensor, num_data_ranks: float, top_k: float, num_groups: int = 1
) -> Tensor:
    """E * sum_e f_e P_e (Switch, arXiv 2101.03961, eq. 4): 1 when balanced, E when all tokens choose one expert.

    f_e is expert e's share of the assignments of ALL ranks, P_e the mean share of its score. Ranks share the
    global token count, so the mean of this loss over ranks is the loss of the global batch on one device. With groups
    it is the mean of the groups' losses, each by itself, weighted by their tokens.

    Args:
        probs_TE: [T, E] of this rank, or their sum as [1, E].
        popularity_E: [E] int of all ranks.
        num_data_ranks: ranks with tokens of their own that took part.
        top_k: K, experts of each token, or their mean number.
        num_groups: equal groups of experts.

    Returns:
        [] floating.
    """
    popularity_E = popularity_E.to(probs_TE)
    num_assignments = popularity_E.sum().clamp(min=1)
    popularity_GE = popularity_E.unflatten(0, (num_groups, -1))
    share_GE = popularity_GE / popularity_GE.sum(-1, keepdim=True).clamp(min=1)
    mean_prob_E = probs_TE.sum(0) * (num_data_ranks * top_k / num_assignments)
    return popularity_GE.shape[1] * (share_GE.flatten() * mean_prob_E).sum()


def z_loss(logits_TE: Tensor, num_tokens: Tensor, num_data_ranks: float) -> Tensor:
    """Mean squared log-sum-exp of the logits (ST-MoE, arXiv 2202.08906, eq. 5), over the tokens of all ranks.

    Its mean over ranks is the loss of the global batch on one device.

    Args:
        logits_TE: [T, E] of this rank.
        num_tokens: [], of all ranks.
        num_data_ranks: ranks with tokens of their own that took part.

    Returns:
        [] floating.
    """
    return logits_TE.logsumexp(-1).square().sum() * num_data_ranks / num_tokens.clamp(min=1)


def wide_linear(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight^T, [T, E], in float32 (float64 for float64 weights) whatever autocast says."""
    wide = torch.promote_types(weight_ED.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.to(wide), weight_ED.to(wide))


def _output(routed: Routing, logits_TE: Tensor) -> RouterOutput:
    return RouterOutput(
        routed.expert_ids_TK,
        routed.weights_TK,
        logits_TE,
        prob_sums_E=routed.prob_sums_E,
        square_sum=routed.square_sum,
    )
