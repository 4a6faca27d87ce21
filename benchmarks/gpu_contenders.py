"""Who computes the layer in the GPU benchmark: ours on each path, and others' ways, as far as they are installed.

A contender takes x [T, D], expert ids [T, K] int64, scores [T, K] float32 and weights, and returns [T, D]. All get the
same inputs; none gets a router's work done before. T tokens, D model dim, F hidden dim, E experts, K top-k, R = T * K.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_shapes import Shape
from swiftmoe_lightning.kernels import combine, expert_layer, expert_mlp, paths, permute, sort_choices

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Contender:
    """run: see the file's words. prepare: weights as it wants to have them, before the clock starts. restore: gradients
    of those as gradients of the ones that were given. refuses: a reason not to run a shape, or None."""

    run: Callable[[Shape, Tensor, Tensor, Tensor, Weights], Tensor]
    prepare: Callable[[Weights], Weights] = dict
    restore: Callable[[Weights], Weights] = dict
    refuses: Callable[[Shape], str | None] = lambda shape: None


def ours_fused(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """Our fused kernels, whatever `choose_layer` would say."""
    order = sort_choices(ids.flatten(), shape.experts)
    rows_TK = order.row_N.view(ids.shape)
    return expert_layer(x, scores, order.choice_N, rows_TK, order.ends_G, weights, shape.activation)


def ours_grouped(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """Our operations around `F.grouped_mm`: what `expert_layer` does where it does not fuse."""
    order = sort_choices(ids.flatten(), shape.experts)
    rows_TK = order.row_N.view(ids.shape)
    x_RD = permute(x, order.choice_N, rows_TK)
    y_RD = expert_mlp(x_RD, weights, order.ends_G, shape.activation)
    return combine(y_RD, scores, order.choice_N, rows_TK)


def on_triton(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with every operation on Triton. Only around forward: the fused layer's backward is Triton's anyway."""

    def forced(*inputs: Any) -> Tensor:
        with paths.forced("triton"):
            return run(*inputs)

    return forced


def activated(z: Tensor, activation: str) -> Tensor:
    """As torch users write it."""
    if activation == "swiglu":
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(z) if activation == "gelu" else F.relu(z).square()


def up_of(weights: Weights) -> Tensor:
    return weights["gate_up_proj"] if "gate_up_proj" in weights else weights["up_proj"]


def eager_loop(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """One expert after the other, as transformers' eager experts do."""
    out, scores = torch.zeros_like(x), scores.to(x.dtype)
    for expert in ids.unique().tolist():
        token, k = (ids == expert).nonzero(as_tuple=True)
        hidden = activated(F.linear(x[token], up_of(weights)[expert]), shape.activation)
        y = F.linear(hidden, weights["down_proj"][expert])
        out = out.index_add(0, token, y * scores[token, k].unsqueeze(-1))
    return out


def hf_grouped_mm(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """transformers' default: its own function where that is installed, else the same in its order."""
    scores = scores.to(x.dtype)
    try:
        from transformers.integrations.moe import grouped_mm_experts_forward
    except ImportError:
        return _plain_grouped_mm(shape, x, ids, scores, weights)
    is_gated = shape.activation == "swiglu"
    module = SimpleNamespace(num_experts=shape.experts, has_gate=is_gated, has_bias=False, is_transposed=False)
    module.is_concatenated, module._is_expert_parallel, module.has_post_expert_norm = True, False, False
    module._apply_gate = module.act_fn = lambda z: activated(z, shape.activation)
    vars(module).update(weights)
    out: Tensor = grouped_mm_experts_forward(module, x, ids, scores)
    return out


def _plain_grouped_mm(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    expert_R, perm_R = ids.flatten().sort()
    counts_E = torch.histc(
        expert_R.float() if x.device.type == "cpu" else expert_R.int(), shape.experts, 0, shape.experts - 1
    )
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    z = F.grouped_mm(x[perm_R // shape.top_k], up_of(weights).transpose(1, 2), offs=ends_E)
    y = F.grouped_mm(activated(z, shape.activation), weights["down_proj"].transpose(1, 2), offs=ends_E)
    y = y * scores.flatten()[perm_R].unsqueeze(-1)
    inverse_R = torch.empty_like(perm_R)
    inverse_R[perm_R] = torch.arange(len(perm_R), device=x.device)
    return y[inverse_R].view(shape.tokens, shape.top_k, shape.dim).sum(1)


def torchtitan(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """torchtitan's algorithm on one device: three products, float32 scores, and torch's scatter-add."""
    order_R = ids.flatten().argsort(stable=True)
    counts_E = torch.zeros(shape.experts, dtype=torch.int64, device=x.device)
    counts_E = counts_E.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten()))
    ends_E, token_R = counts_E.cumsum(0, dtype=torch.int32), order_R // shape.top_k
    x_R = x[token_R]
    h = F.grouped_mm(x_R, weights["w1"].transpose(1, 2), offs=ends_E)
    h = F.silu(h) * F.grouped_mm(x_R, weights["w3"].transpose(1, 2), offs=ends_E)
    y = F.grouped_mm(h, weights["w2"].transpose(1, 2), offs=ends_E)
    y = (y.float() * scores.flatten()[order_R].unsqueeze(-1)).to(x.dtype)
    return torch.zeros_like(x).scatter_add(0, token_R.unsqueeze(-1).expand_as(y), y)


def split_matrices(weights: Weights) -> Weights:
    w1, w3 = (part.contiguous() for part in weights["gate_up_proj"].chunk(2, dim=1))
    return {"w1": w1, "w3": w3, "w2": weights["down_proj"]}


def joined_matrices(grads: Weights) -> Weights:
    return {"gate_up_proj": torch.cat([grads["w1"], grads["w3"]], dim=1), "down_proj": grads["w2"]}


def liger() -> Callable[..., Tensor]:
    """Liger-Kernel's fused MoE."""
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def run(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
        out: Tensor = function.apply(x, up_of(weights), weights["down_proj"], ids.int(), scores.to(x.dtype))
        return out

    return run


def scattermoe() -> Callable[..., Tensor]:
    """ScatterMoE's two parallel linears."""
    module = importlib.import_module("scattermoe.parallel_experts")
    sort, linear = module.flatten_sort_count, module.parallel_linear

    def run(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
        order = sort(ids, num_experts=shape.experts)
        z = linear(x, up_of(weights).transpose(1, 2), shape.top_k, *order, grouped_out=True)
        w2 = weights["down_proj"].transpose(1, 2)
        gates = scores.to(x.dtype)
        out: Tensor = linear(activated(z, shape.activation), w2, 1, *order, grouped_in=True, gates=gates)
        return out

    return run


def sonicmoe() -> Callable[..., Tensor]:
    """SonicMoE, given the routing."""
    kinds = importlib.import_module("sonicmoe.enums").ActivationType
    function = importlib.import_module("sonicmoe.functional").moe_general_routing_inputs

    def run(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
        token_R = torch.arange(shape.tokens, device=x.device, dtype=torch.int32).repeat_interleave(shape.top_k)
        w1, w2 = up_of(weights).permute(1, 2, 0), weights["down_proj"].permute(1, 2, 0)
        stream = torch.cuda.current_stream().cuda_stream
        found = function(
            *(x, scores.flatten(), token_R, ids.flatten().int(), w1, None, w2, None, shape.experts, stream),
            *(kinds.SWIGLU, False),
            concat_layout=True,
        )
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return run


def gated_only(shape: Shape) -> str | None:
    return None if shape.activation == "swiglu" else "for gated experts only"


def few_tokens_only(shape: Shape) -> str | None:
    return None if shape.tokens <= 8192 else "a loop over experts that waits for the GPU: for 8,192 tokens at most"


def contenders() -> tuple[dict[str, Contender], dict[str, str]]:
    """(name -> contender, name -> why it is not there)."""
    found = {
        "ours, fused": Contender(on_triton(ours_fused)),
        "ours, grouped_mm": Contender(ours_grouped),
        "HF grouped_mm": Contender(hf_grouped_mm),
        "torchtitan": Contender(torchtitan, split_matrices, joined_matrices, gated_only),
        "HF eager": Contender(eager_loop, refuses=few_tokens_only),
    }
    missing = {}
    for name, load in {"Liger": liger, "ScatterMoE": scattermoe, "SonicMoE": sonicmoe}.items():
        try:
            found[name] = Contender(load(), refuses=gated_only)
        except Exception as error:  # whatever a package of others raises where it does not fit this machine
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
