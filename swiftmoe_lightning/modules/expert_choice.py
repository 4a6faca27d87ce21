"""A router whose experts choose tokens.

T tokens, D model dim, E experts, C tokens of an expert, K the most experts of a token, up to a power of two.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from swiftmoe_lightning.modules.router import RouterOutput, TopKRouter
from swiftmoe_lightning.ops import score_logits


class ExpertChoiceRouter(TopKRouter):
    """Each expert takes the tokens that score it best (Expert Choice, Zhou et al., arXiv 2202.09368, section 3.2).

    Of T tokens an expert takes C = ceil(T * top_k / E), so that all have the same load. A token has any number of
    experts, or none. It is not causal: whether an expert takes a token depends on all tokens of the forward, also on
    later ones of its sequence, and in evaluation, too. Take it for encoders, not for models that generate. Each rank's
    experts choose among its own tokens. The forward waits for the GPU once, for the most experts that a token has.

    Args:
        dim: D.
        num_experts: E.
        top_k: the mean number of experts of a token.
        device: of the weight.
        dtype: of the weight.

    Raises:
        ValueError: if top_k is not in 1..E, or for a size below 1.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_experts, top_k, renormalize=False, device=device, dtype=dtype)

    def choose(self, logits_TE: Tensor, token_ids_T: Tensor | None) -> RouterOutput:
        """See `TopKRouter.choose`. Ids of -1 are unassigned; their weights are zero."""
        num_tokens, num_experts = logits_TE.shape
        capacity = -(-num_tokens * self.top_k // num_experts)
        ids_TK, is_chosen_TK = _chosen(score_logits(logits_TE.detach(), self.score), capacity)
        routed = self.weigh(logits_TE, ids_TK)
        return replace(
            routed,
            expert_ids_TK=torch.where(is_chosen_TK, ids_TK, -1),
            weights_TK=routed.weights_TK * is_chosen_TK,
            mean_experts=capacity * num_experts / num_tokens if num_tokens else self.top_k,
        )


# torch.compile cannot trace sizes that depend on values.
@torch.compiler.disable
def _chosen(scores_TE: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """([T, K] int64, [T, K] bool): experts, and whether they took the token."""
    tokens_CE = scores_TE.topk(capacity, dim=0).indices
    taken_TE = torch.full_like(scores_TE, -1.0).scatter_(0, tokens_CE, scores_TE.gather(0, tokens_CE))
    most = int((taken_TE >= 0).sum(1).max().item()) if len(scores_TE) else 1
    # Few widths, for kernels are compiled for each.
    width = min(1 << (most - 1).bit_length(), scores_TE.shape[1]) if most else 1
    best = taken_TE.topk(width, dim=-1)
    return best.indices, best.values >= 0
