"""A router that chooses inside the group of experts of a token's sequence.

T tokens, D model dim, E experts, K top-k, G groups of experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.config import check_whole
from swiftmoe_lightning.modules.router import RouterOutput, TopKRouter
from swiftmoe_lightning.ops import score_logits


class ClusteredRouter(TopKRouter):
    """The cluster of a sequence names its group of experts, and each token chooses its K best inside.

    Routing in two stages, as in Mixture of Clustered Experts (MoCE): sequences are clustered beforehand, for which
    `SequenceClusters` is. Experts 0..E-1 are cut into G groups in their order, and cluster c has group c.
    `moe(x, cluster_ids=ids)` gives one id for each sequence. Scores, their softmax and the losses are of the token's
    group alone: balance is asked for inside groups, and not between them, since clusters differ in size.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, how many experts of its group each token chooses.
        num_groups: G, the number of clusters; it divides E.
        **options: `score`, `renormalize`, `bias_update_rate`, `device` and `dtype`, as of `TopKRouter`.

    Raises:
        ValueError: for what `TopKRouter` refuses, groups that do not divide the experts, or fewer than K experts in a
            group.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, num_groups: int, **options: Any) -> None:
        super().__init__(dim, num_experts, top_k, **options)
        check_whole(num_groups=num_groups)
        if num_experts % num_groups:
            raise ValueError(f"num_groups must divide num_experts={num_experts}, got {num_groups}.")
        if top_k > num_experts // num_groups:
            raise ValueError(
                f"num_groups={num_groups} gives groups of {num_experts // num_groups} experts, but top_k is {top_k}. "
                f"Choose num_groups={num_experts // top_k} or less."
            )
        self.num_groups = num_groups

    def forward(
        self, x_TD: Tensor, token_ids_T: Tensor | None = None, cluster_ids_T: Tensor | None = None
    ) -> RouterOutput:
        """See `TopKRouter.forward`.

        Args:
            x_TD: [T, D] floating.
            token_ids_T: ignored.
            cluster_ids_T: [T] int of 0..G-1, of each token's sequence.

        Raises:
            ValueError: without cluster ids, or, on the CPU, for other ones. (A GPU stops at an index out of bounds.)
        """
        if cluster_ids_T is None:
            raise ValueError(
                "ClusteredRouter chooses by the clusters of sequences, and got none. Call moe(x, cluster_ids=ids)."
            )
        # To look at the values would make a GPU wait, and break a compiled graph.
        if cluster_ids_T.is_cpu and not torch.compiler.is_compiling() and cluster_ids_T.numel():
            least, most = int(cluster_ids_T.min()), int(cluster_ids_T.max())
            if least < 0 or most >= self.num_groups:
                raise ValueError(
                    f"cluster ids must be in 0..{self.num_groups - 1}, as there are num_groups={self.num_groups}, got "
                    f"{least}..{most}. Make as many clusters as groups."
                )
        return super().forward(x_TD, cluster_ids_T)

    def choose(self, logits_TE: Tensor, token_ids_T: Tensor | None) -> RouterOutput:
        """See `TopKRouter.choose`; the ids are those of clusters."""
        assert token_ids_T is not None
        with torch.no_grad():
            # A negative index would count from the end.
            groups_T = token_ids_T.masked_fill(token_ids_T < 0, self.num_groups)
            scores_TE = score_logits(self._in_groups(logits_TE, groups_T), self.score)
            if self.expert_bias is not None:
                scores_TE = scores_TE + self.expert_bias
            scores_TE = self._in_groups(scores_TE, groups_T)
            expert_ids_TK = scores_TE.topk(self.top_k, dim=-1, sorted=False).indices
        return self.weigh(logits_TE, expert_ids_TK)

    def weigh(self, logits_TE: Tensor, expert_ids_TK: Tensor) -> RouterOutput:
        """See `TopKRouter.weigh`; the scores are those in the group of a token's first expert."""
        groups_T = expert_ids_TK[:, 0] // (len(self.weight) // self.num_groups)
        routed = super().weigh(self._in_groups(logits_TE, groups_T), expert_ids_TK)
        # Scores of other groups are -inf on purpose: the block looks for such that are not.
        return replace(routed, logits_TE=logits_TE, num_groups=self.num_groups)

    def _in_groups(self, scores_TE: Tensor, groups_T: Tensor) -> Tensor:
        """[T, E], -inf outside of each token's group."""
        is_own_GG = torch.eye(self.num_groups, dtype=torch.bool, device=scores_TE.device)
        is_other_GE = ~is_own_GG.repeat_interleave(len(self.weight) // self.num_groups, dim=1)
        return scores_TE.masked_fill(is_other_GE[groups_T], -torch.inf)

    def update_bias(self, popularity_E: np.ndarray) -> None:
        """Move `expert_bias` towards experts with less than the mean popularity of their group.

        Args:
            popularity_E: [E], of one step.
        """
        popularity_Ge = popularity_E.reshape(self.num_groups, -1)
        super().update_bias((popularity_Ge - popularity_Ge.mean(1, keepdims=True)).reshape(-1))
