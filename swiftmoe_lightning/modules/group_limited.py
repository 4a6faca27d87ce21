"""A router that limits each token to its best groups of experts.

T tokens, D model dim, E experts, K top-k, G groups of experts, e experts of a group, M groups that a token chooses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from swiftmoe_lightning.config import check_coefficient, check_whole
from swiftmoe_lightning.modules.router import RouterOutput, TopKRouter
from swiftmoe_lightning.ops import score_logits


class GroupLimitedRouter(TopKRouter):
    """The K best experts in each token's M best groups of experts, as in DeepSeek-V2 and DeepSeek-V3.

    Experts 0..E-1 are cut into G groups in their order. The score of a group is the sum of its best experts' scores
    (DeepSeek-V2, arXiv 2405.04434, section 2.2.2; DeepSeek-V3, arXiv 2412.19437, section 2.1.2). V3 is `(7168, 256, 8,
    num_groups=8, top_k_groups=4, scaling_factor=2.5, score="sigmoid", bias_update_rate=1e-3)`, V2 `(5120, 160, 6,
    num_groups=8, top_k_groups=3, scores_per_group=1, scaling_factor=16.0, renormalize=False)`.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, how many experts each token chooses.
        num_groups: G; it divides E.
        top_k_groups: M, how many groups each token chooses.
        scores_per_group: how many of a group's best scores are added up to rank it: 2 in V3, 1 in V2.
        scaling_factor: of all weights.
        **options: `score`, `renormalize`, `bias_update_rate` (its bias takes part in both choices), `device` and
            `dtype`, as of `TopKRouter`.

    Raises:
        ValueError: for what `TopKRouter` refuses, groups that do not divide the experts, more groups or scores than
            there are, or fewer than K experts in M groups.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        num_groups: int,
        top_k_groups: int,
        scores_per_group: int = 2,
        scaling_factor: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_experts, top_k, **options)
        check_whole(num_groups=num_groups, top_k_groups=top_k_groups, scores_per_group=scores_per_group)
        check_coefficient(scaling_factor=scaling_factor)
        if num_experts % num_groups:
            raise ValueError(f"num_groups must divide num_experts={num_experts}, got {num_groups}.")
        if top_k_groups > num_groups:
            raise ValueError(f"top_k_groups must be in 1..num_groups={num_groups}, got {top_k_groups}.")
        group_size = num_experts // num_groups
        if scores_per_group > group_size:
            raise ValueError(f"scores_per_group must be in 1..{group_size}, a group's experts, got {scores_per_group}.")
        if top_k > top_k_groups * group_size:
            raise ValueError(
                f"top_k_groups={top_k_groups} groups of {group_size} experts hold {top_k_groups * group_size}, but "
                f"top_k is {top_k}. Choose top_k_groups={-(-top_k // group_size)} or more."
            )
        self.num_groups, self.top_k_groups, self.scores_per_group = num_groups, top_k_groups, scores_per_group
        self.scaling_factor = scaling_factor

    @torch.no_grad()
    def _best_in_groups(self, logits_TE: Tensor) -> Tensor:
        """[T, K] int64, in no order."""
        scores_TE = score_logits(logits_TE, self.score)
        if self.expert_bias is not None:
            scores_TE = scores_TE + self.expert_bias
        scores_TGe = scores_TE.unflatten(-1, (self.num_groups, -1))
        group_scores_TG = scores_TGe.topk(self.scores_per_group, dim=-1).values.sum(-1)
        groups_TM = group_scores_TG.topk(self.top_k_groups, dim=-1, sorted=False).indices
        is_outside_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(-1, groups_TM, False)
        limited_TE = scores_TGe.masked_fill(is_outside_TG.unsqueeze(-1), -torch.inf).flatten(-2)
        return limited_TE.topk(self.top_k, dim=-1, sorted=False).indices

    def choose(self, logits_TE: Tensor, token_ids_T: Tensor | None) -> RouterOutput:
        """See `TopKRouter.choose`."""
        return self.weigh(logits_TE, self._best_in_groups(logits_TE))

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> RouterOutput:
        """See `TopKRouter.weigh`; the weights are scaled."""
        routed = super().weigh(logits_TE, expert_ids_TK)
        return replace(routed, weights_TK=routed.weights_TK * self.scaling_factor)
