"""Routers that explore by noise in training. T tokens, D model dim, E experts, K top-k.

They draw from the default generator, as dropout does: other noise on each rank if their seeds differ, and the same
noise again where activation checkpointing runs the forward a second time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swiftmoe_lightning.config import check_coefficient
from swiftmoe_lightning.modules.router import TopKRouter, wide_linear


class JitterRouter(TopKRouter):
    """`TopKRouter` whose input is multiplied by uniform noise in training (Switch, arXiv 2101.03961, appendix C).

    The experts get the input without noise.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, how many experts each token chooses.
        jitter: each number of the input is multiplied by one drawn from 1 - jitter .. 1 + jitter.
        **options: as of `TopKRouter`.

    Raises:
        ValueError: for what `TopKRouter` refuses, or a jitter that is not a number of 0 or more.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, *, jitter: float = 0.01, **options: Any) -> None:
        super().__init__(dim, num_experts, top_k, **options)
        check_coefficient(jitter=jitter)
        self.jitter = jitter

    def logits(self, x_TD: Tensor) -> Tensor:
        """See `TopKRouter.logits`; with noise in training."""
        if self.training:
            # In bfloat16 1 + 0.01 has two digits.
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        return super().logits(x_TD)


class NoisyTopKRouter(TopKRouter):
    """Top-k of logits plus Gaussian noise, whose width is learned (Shazeer et al., arXiv 1701.06538, section 2.1).

    In training a logit is x W + N(0, 1) * softplus(x W_noise), for choice, weights and losses alike. W_noise begins as
    zero, as in the paper's appendix A. With K = 1 the weight is the score, for a share of one would be 1.

    Args:
        dim: D.
        num_experts: E.
        top_k: K, how many experts each token chooses.
        **options: as of `TopKRouter`.

    Attributes:
        noise: the linear layer of W_noise, [E, D].

    Raises:
        ValueError: for what `TopKRouter` refuses.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int, **options: Any) -> None:
        super().__init__(dim, num_experts, top_k, **options)
        like = {"device": self.weight.device, "dtype": self.weight.dtype}
        self.noise = _ZeroLinear(dim, num_experts, bias=False, **like)

    def logits(self, x_TD: Tensor) -> Tensor:
        """See `TopKRouter.logits`; with noise in training."""
        logits_TE = super().logits(x_TD)
        if not self.training:
            return logits_TE
        width_TE = F.softplus(wide_linear(x_TD, self.noise.weight))
        return logits_TE + torch.randn_like(logits_TE) * width_TE


class _ZeroLinear(nn.Linear):
    """It begins as zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
