"""The training run that is measured: a stack of MoE blocks whose popularity is skewed, noisy and stationary.

T tokens of a rank, D model dim, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import swiftmoe_lightning as sml
from benchmarks.common.command_line import setting


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and of each rank's batch."""

    layers: int = setting(4, "MoE layers")
    dim: int = setting(128, "model dim")
    hidden_dim: int = setting(512, "hidden dim of an expert")
    experts: int = setting(8, "experts of a layer")
    top_k: int = setting(2, "experts of a token")
    tokens: int = setting(512, "of each rank's batch")


class SkewedRouter(nn.Module):
    """Draws experts at random: a quarter of them are four times as popular as the others, in every step.

    So any placement fits every step equally well, but for noise, and routers of one seed always choose alike,
    whatever their models learn. Weights are learned, so that the router has gradients, as real ones do.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.top_k = sizes.top_k
        self.weight = nn.Parameter(0.02 * torch.randn(sizes.experts, sizes.dim))
        self._popularity_E = torch.ones(sizes.experts)
        self._popularity_E[: sizes.experts // 4] = 4.0
        self._generator = torch.Generator().manual_seed(seed)

    def forward(self, x_TD: Tensor) -> sml.RouterOutput:
        """[T, D] -> K different experts of each token, drawn without replacement."""
        logits_TE = F.linear(x_TD, self.weight)
        race_TE = torch.empty_like(logits_TE).exponential_(generator=self._generator)
        expert_ids_TK = (self._popularity_E / race_TE).topk(self.top_k, dim=-1).indices
        probs_TE = logits_TE.softmax(-1)
        weights_TK = probs_TE.gather(-1, expert_ids_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return sml.RouterOutput(expert_ids_TK, weights_TK, logits_TE, probs_TE)


class Block(nn.Module):
    """x + moe(norm(x))."""

    def __init__(self, sizes: Sizes, seed: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(sizes.dim)
        router = SkewedRouter(sizes, seed)
        self.moe = sml.MoE(sizes.dim, sizes.hidden_dim, sizes.experts, sizes.top_k, router=router)

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD: Tensor = x_TD + self.moe(self.norm(x_TD))
        return out_TD


class TrainingLoop:
    """A model under an engine, its optimizer and one batch; two of equal sizes do the same work, token for token."""

    def __init__(self, sizes: Sizes, *, fused: bool | None = None) -> None:
        rank = dist.get_rank()
        torch.manual_seed(0)
        blocks = [Block(sizes, seed=rank * sizes.layers + layer) for layer in range(sizes.layers)]
        self.module = nn.Sequential(*blocks, nn.Linear(sizes.dim, sizes.dim))
        self.engine = sml.SwiftMoEEngine(self.module, sml.SwiftMoEConfig(placement="packed"))
        self.model = self.engine.data_parallel()
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=fused)
        self.optimizer = self.engine.prepare_optimizer(optimizer)
        self._x_TD = torch.randn(sizes.tokens, sizes.dim, generator=torch.Generator().manual_seed(rank))

    def set_adapting(self, every_step: bool) -> None:
        """Make a new placement in every step, or keep the present one."""
        replace_every = 1 if every_step else 2**62
        self.engine.config = replace(self.engine.config, replace_every=replace_every)

    def forward(self) -> Tensor:
        """The loss on this rank's batch."""
        loss: Tensor = self.model(self._x_TD).square().mean()
        return loss

    def step(self) -> None:
        """One training step."""
        self.forward().backward()
        self.engine.clip_grad_norm_(1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait_for_weights(self) -> None:
        """Wait until the distributed weights have arrived, as the next forward would."""
        for layer in self.engine.layers:
            layer.slots.finish_distribution()
