"""What every system trains: a small transformer with MoE blocks, one batch a rank, and routes that are drawn.

T tokens of a rank and step, D model dim, E experts, K top-k, B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import swiftmoe_lightning as sml
from benchmarks.common.command_line import setting
from swiftmoe_lightning.demo.gpt import NUM_BYTES, Attention

ROUTINGS: Final = ("even", "zipf", "moving")
SEQUENCE: Final = 128
# How many steps of "moving" have one order.
_STEPS_OF_AN_ORDER: Final = 10


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model and of each rank's batch."""

    layers: int = setting(4, "blocks: attention, then experts")
    dim: int = setting(128, "model dim")
    hidden_dim: int = setting(256, "hidden dim of an expert")
    experts: int = setting(16, "experts of a layer")
    top_k: int = setting(2, "experts of a token")
    tokens: int = setting(512, "of each rank's batch, in sequences of 128")


LARGE: Final = Sizes(layers=6, dim=512, hidden_dim=1024, experts=16, top_k=2, tokens=1024)


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        sizes: of the model and the batch.
        routing: one of ROUTINGS.
    """

    sizes: Sizes
    routing: str


class DrawnRoutes:
    """Draws the experts of a layer's tokens at random, with fixed popularities, whatever the model learns.

    "even": all are equally popular. "zipf": the i-th has 1 / i of the first one's, in a fixed random order, so that
    any placement made from one step's popularity fits all others but for noise. "moving": the same in another order
    every ten steps. Those of one layer and rank draw alike in every system.

    Args:
        workload: what is trained.
        layer: which of its layers.
    """

    def __init__(self, workload: Workload, layer: int) -> None:
        self._sizes, self._routing, self._layer = workload.sizes, workload.routing, layer
        self._generator = torch.Generator()
        self.restart()

    def restart(self) -> None:
        """Draw again from the first step on."""
        self._step = 0
        self._generator.manual_seed(dist.get_rank() * self._sizes.layers + self._layer)

    def popularity_E(self) -> Tensor:
        """[E] float, relative, of the next step; equal on all ranks."""
        num_experts = self._sizes.experts
        if self._routing == "even":
            return torch.ones(num_experts)
        order = self._layer + (self._step // _STEPS_OF_AN_ORDER if self._routing == "moving" else 0)
        order_E = torch.randperm(num_experts, generator=torch.Generator().manual_seed(order))
        popularity_E = torch.empty(num_experts)
        popularity_E[order_E] = 1 / torch.arange(1.0, num_experts + 1)
        return popularity_E

    def draw(self, num_tokens: int) -> Tensor:
        """[T, K] int64: K different experts of each token, drawn without replacement. Call it once a step."""
        race_TE = torch.empty(num_tokens, self._sizes.experts).exponential_(generator=self._generator)
        ids_TK = (self.popularity_E() / race_TE).topk(self._sizes.top_k, dim=-1).indices
        self._step += 1
        return ids_TK


class DrawnRouter(nn.Module):
    """A router whose choices are drawn; the weights of the choices are learned, a softmax over their scores.

    Args:
        workload: what is trained.
        layer: which of its layers.
    """

    def __init__(self, workload: Workload, layer: int) -> None:
        super().__init__()
        self.top_k, self.routes = workload.sizes.top_k, DrawnRoutes(workload, layer)
        self.weight = nn.Parameter(0.02 * torch.randn(workload.sizes.experts, workload.sizes.dim))

    def forward(self, x_TD: Tensor) -> sml.RouterOutput:
        """[T, D] -> K experts of each token."""
        logits_TE = F.linear(x_TD, self.weight)
        ids_TK = self.routes.draw(len(x_TD))
        return sml.RouterOutput(ids_TK, logits_TE.gather(1, ids_TK).softmax(-1), logits_TE)


class RoutedExperts(nn.Module):
    """A MoE block of another system: a router, and experts that take what transformers' do. [..., D] -> [..., D].

    Args:
        router: [T, D] -> `RouterOutput`.
        experts: ([T, D], ids [T, K], weights [T, K]) -> [T, D].
    """

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x_TD = x.flatten(0, -2)
        routed = self.router(x_TD)
        out_TD: Tensor = self.experts(x_TD, routed.expert_ids_TK, routed.weights_TK)
        return out_TD.view(x.shape)


class Block(nn.Module):
    """Attention, then experts, each behind a norm and in a residual: [B, T, D] -> [B, T, D]."""

    def __init__(self, workload: Workload, layer: int) -> None:
        super().__init__()
        sizes = workload.sizes
        self.attention_norm, self.attention = nn.RMSNorm(sizes.dim), Attention(sizes.dim)
        self.moe_norm = nn.RMSNorm(sizes.dim)
        router = DrawnRouter(workload, layer)
        # Another system puts a module of its own here.
        self.moe: nn.Module = sml.MoE(sizes.dim, sizes.hidden_dim, sizes.experts, sizes.top_k, router=router)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD))
        out_BTD: Tensor = x_BTD + self.moe(self.moe_norm(x_BTD))
        return out_BTD


class Model(nn.Module):
    """[B, T] int64 -> [B, T, V] logits, from one seed. The single-device MoE that each system spreads its own way.

    Attributes:
        routes: where each layer's tokens go.
        batch_BT: [B, T + 1] int64, this rank's batch in every step: random tokens.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        torch.manual_seed(0)
        dim = workload.sizes.dim
        self.embedding = nn.Embedding(NUM_BYTES, dim)
        self.blocks = nn.ModuleList(Block(workload, layer) for layer in range(workload.sizes.layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, NUM_BYTES, bias=False)
        self.routes = [block.moe.router.routes for block in self.blocks]
        length = min(workload.sizes.tokens, SEQUENCE)
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.batch_BT = torch.randint(NUM_BYTES, (workload.sizes.tokens // length, length + 1), generator=generator)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """[B, T] int64 -> [B, T, V]."""
        x_BTD = self.embedding(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits_BTV: Tensor = self.head(self.norm(x_BTD))
        return logits_BTV


def optimizer_of(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every system: fused AdamW."""
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)
