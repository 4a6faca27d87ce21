"""A dense MoE model for one process, written without the package: loops over experts, stock torch for the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIM, NUM_EXPERTS, HIDDEN, TOP_K = 10, 5, 7, 2
STEPS, MICRO_BATCHES, TOKENS = 30, 2, 24


def dense_forward(weights: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    """Linear, MoE(swiglu, top-2 of 5), tanh, MoE(gelu with biases, top-1 of 3), linear."""
    hidden = F.linear(x_TD, weights["0.weight"], weights["0.bias"])
    hidden = torch.tanh(hidden + dense_moe(weights, "1", hidden, TOP_K))
    hidden = hidden + dense_moe(weights, "2", hidden, 1)
    return F.linear(hidden, weights["3.weight"], weights["3.bias"])


def dense_moe(weights: dict[str, Tensor], name: str, x_TD: Tensor, top_k: int) -> Tensor:
    """Every expert on every token, weighted by the token's top-k softmax scores, renormalized if there are several."""
    scores_TE = F.linear(x_TD, weights[f"{name}.router.weight"]).softmax(-1)
    best = scores_TE.topk(top_k, dim=-1)
    gates_TK = best.values if top_k == 1 else best.values / best.values.sum(-1, keepdim=True)
    gates_TE = torch.zeros_like(scores_TE).scatter(-1, best.indices, gates_TK)
    out_TD = torch.zeros_like(x_TD)
    for expert in range(scores_TE.shape[1]):
        out_TD = out_TD + gates_TE[:, expert : expert + 1] * dense_expert(weights, f"{name}.experts", expert, x_TD)
    return out_TD


def dense_expert(weights: dict[str, Tensor], name: str, expert: int, x_TD: Tensor) -> Tensor:
    down = weights[f"{name}.down_proj"][expert]
    if f"{name}.gate_up_proj" in weights:
        gate, up = (x_TD @ weights[f"{name}.gate_up_proj"][expert].T).chunk(2, dim=-1)
        return (F.silu(gate) * up) @ down.T
    hidden = x_TD @ weights[f"{name}.up_proj"][expert].T + weights[f"{name}.up_proj_bias"][expert]
    return F.gelu(hidden) @ down.T + weights[f"{name}.down_proj_bias"][expert]


def batch(step: int, micro_batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[24, DIM] inputs and [24, 3] targets of the global micro-batch."""
    generator = torch.Generator().manual_seed(1000 * step + micro_batch)
    x = torch.randn(TOKENS, DIM, generator=generator, dtype=dtype)
    return x, torch.randn(TOKENS, 3, generator=generator, dtype=dtype)


def train_dense(start: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """30 AdamW steps of two micro-batches each, gradients clipped at norm 0.5."""
    weights = {name: value.to(dtype).clone().requires_grad_() for name, value in start.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    for step in range(STEPS):
        for micro_batch in range(MICRO_BATCHES):
            x, target = batch(step, micro_batch, dtype)
            (F.mse_loss(dense_forward(weights, x), target) / MICRO_BATCHES).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in weights.items()}
