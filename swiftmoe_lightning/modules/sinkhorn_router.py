"""A router that balances the tokens of a forward over the experts. T tokens, D model dim, E experts, K top-k."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from swiftmoe_lightning.modules.router import RouterOutput, TopKRouter

# Megatron-Core's: the change of the columns' factors at which it ends, and what keeps divisors from zero.
_TOLERANCE: Final = 1e-4
_EPSILON: Final = 1e-8
# Factors of columns with tiny scores are large, and rounding alone may move them by more than the tolerance.
_MOST_ITERATIONS: Final = 100


class SinkhornRouter(TopKRouter):
    """In training the top-k of a balanced assignment, in evaluation of the scores; weights are the scores in both.

    The balanced assignment is exp(logits), scaled until the sums of all tokens are equal, and those of all experts
    (Sinkhorn-BASE, Clark et al., arXiv 2202.01169), by Megatron-Core's iteration. Its top-k is nearly even. It is of
    the tokens of one forward on one rank: in training a token's experts depend on others, also on later ones of its
    sequence. Each iteration waits for the GPU. Megatron-Core has `score="sigmoid"` for K = 1, and `renormalize=False`.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, how many experts each token chooses.
        score: as of `TopKRouter`.
        renormalize: as of `TopKRouter`.
        device: of the weight.
        dtype: of the weight.

    Raises:
        ValueError: for what `TopKRouter` refuses.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        renormalize: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Without a bias: scaling the columns would undo it.
        super().__init__(dim, num_experts, top_k, score=score, renormalize=renormalize, device=device, dtype=dtype)

    def choose(self, logits_TE: Tensor, token_ids_T: Tensor | None) -> RouterOutput:
        """See `TopKRouter.choose`."""
        if not self.training:
            return super().choose(logits_TE, token_ids_T)
        return self.weigh(logits_TE, sinkhorn(logits_TE.detach()).topk(self.top_k, dim=-1).indices)


# torch.compile cannot trace a loop that ends by a value.
@torch.compiler.disable
def sinkhorn(logits_TE: Tensor) -> Tensor:
    """exp(logits), rows and columns scaled in turn: rows sum to 1/T and columns to 1/E, up to the tolerance.

    Args:
        logits_TE: [T, E] floating, without a gradient.

    Returns:
        [T, E].
    """
    num_tokens, num_experts = logits_TE.shape
    # The rows' factors take up what is subtracted, which keeps exp from overflow.
    mass_TE = (logits_TE - logits_TE.amax(-1, keepdim=True)).exp()
    factor_T1, factor_E = mass_TE.new_ones(num_tokens, 1), mass_TE.new_ones(num_experts)
    for _ in range(_MOST_ITERATIONS):
        factor_T1 = 1 / (num_tokens * ((mass_TE * factor_E).sum(1, keepdim=True) + _EPSILON))
        previous_E, factor_E = factor_E, 1 / (num_experts * ((mass_TE * factor_T1).sum(0) + _EPSILON))
        # `not >`, so that nan ends it: the scores are refused later, with a message.
        if not (factor_E - previous_E).abs().mean().item() > _TOLERANCE:
            break
    return mass_TE * factor_T1 * factor_E
