"""The GPU benchmark's inputs: the shapes of published models' layers, ways to route, random values, and activations.

T tokens, D model dim, F hidden dim, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """One MoE layer on a batch of tokens."""

    model: str
    tokens: int
    dim: int
    hidden_dim: int
    experts: int
    top_k: int
    activation: str = "swiglu"

    @property
    def flops_forward(self) -> int:
        """Operations of the experts' products, 2 for a multiply-add, without the router; backward has twice as many."""
        matrices = 3 if self.activation == "swiglu" else 2
        return 2 * matrices * self.tokens * self.top_k * self.dim * self.hidden_dim


# In the order in which they are measured, since time may run out.
SHAPES: Final = {
    "B": Shape("OLMoE", 32768, 2048, 1024, 64, 8),
    "Q": Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
    "S": Shape("7B, fine", 24576, 1536, 256, 128, 8),
    "C": Shape("dim 4096, 128 experts", 32768, 4096, 1024, 128, 8),
    "A": Shape("Mixtral 8x7B", 8192, 4096, 14336, 8, 2),
    "D": Shape("GPT, small", 32768, 768, 3072, 16, 1, "gelu"),
    "C2": Shape("dim 4096, 256 experts", 16384, 4096, 2048, 256, 8),
    "B512": Shape("OLMoE, few tokens", 512, 2048, 1024, 64, 8),
}
ROUTINGS: Final = ("balanced", "zipf", "hot")


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one layer.

    x: [T, D]. ids: [T, K] int64, E for one that is unassigned. scores: [T, K] float32, holding bfloat16's values,
    so that a candidate may cast them. grad: [T, D], the output's gradient.
    weights: `gate_up_proj` [E, 2F, D] or `up_proj` [E, F, D], and `down_proj` [E, D, F].
    """

    shape: Shape
    x: Tensor
    ids: Tensor
    scores: Tensor
    weights: Weights
    grad: Tensor


def make_case(shape: Shape, routing: str, device: str, dtype: torch.dtype, seed: int = 0) -> Case:
    """Random inputs of unit scale; equal seeds give equal ones on one device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=dtype).mul_(scale)

    first, rows = ("gate_up_proj", 2) if shape.activation == "swiglu" else ("up_proj", 1)
    scores_TK = torch.rand(shape.tokens, shape.top_k, generator=generator, device=device) + 0.1
    scores_TK = (scores_TK / scores_TK.sum(-1, keepdim=True)).bfloat16().float()
    weights = {
        first: normal(shape.experts, rows * shape.hidden_dim, shape.dim, scale=shape.dim**-0.5),
        "down_proj": normal(shape.experts, shape.dim, shape.hidden_dim, scale=shape.hidden_dim**-0.5),
    }
    x_TD, grad_TD = normal(shape.tokens, shape.dim), normal(shape.tokens, shape.dim)
    return Case(shape, x_TD, route(shape, routing, generator), scores_TK, weights, grad_TD)


def activated(z: Tensor, activation: str) -> Tensor:
    """The activation, written with torch's functions."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(z) if activation == "gelu" else F.relu(z).square()


def up_weight(weights: Weights) -> Tensor:
    """The first matrix: gate and up, or up alone."""
    return weights["gate_up_proj"] if "gate_up_proj" in weights else weights["up_proj"]


def route(shape: Shape, routing: str, generator: torch.Generator) -> Tensor:
    """[T, K] int64, K different experts for each token.

    routing: "balanced", all experts alike. "zipf", the n-th expert is drawn first with a chance as 1 / n. "hot", one
    expert has four times the mean, or every token. For checks: "one", as many as possible go to the first K; "empty",
    every other expert gets nothing; "drops", a fifth of the assignments is unassigned.
    """
    size, device = (shape.tokens, shape.experts), generator.device
    uniform_TE = torch.rand(*size, generator=generator, device=device)
    if routing == "zipf":
        # The largest of log p + Gumbel noise is drawn with chance p, and the next as if the first were gone.
        rank_E = torch.randperm(shape.experts, generator=generator, device=device) + 1
        uniform_TE = -(-uniform_TE.clamp(1e-7, 1 - 1e-7).log()).log() - rank_E.log()
    elif routing == "hot":
        share = 4 * shape.top_k / shape.experts
        uniform_TE[:, 0] = (torch.rand(shape.tokens, generator=generator, device=device) < share) * 3.0 - 1
    elif routing == "one":
        uniform_TE = -torch.arange(shape.experts, device=device).expand(size)
    elif routing == "empty":
        uniform_TE[:, 1::2] -= 1
    ids_TK = uniform_TE.topk(shape.top_k, dim=-1).indices
    if routing == "drops":
        dropped_TK = torch.rand(ids_TK.shape, generator=generator, device=device) < 0.2
        ids_TK = ids_TK.masked_fill(dropped_TK, shape.experts)
    return ids_TK
