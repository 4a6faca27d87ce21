"""Who computes the layer in the GPU benchmark: ours on each path, and others' ways, as far as they are installed.

A contender takes x [T, D], expert ids [T, K] int64, scores [T, K] float32 and weights, and returns [T, D]. All get the
same inputs; none gets a router's work done before. T tokens, D model dim, F hidden dim, E experts, K top-k, R = T * K.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_shapes import Shape
from swiftmoe_lightning.ops import backend, combine, expert_layer, expert_mlp, permute, sort_assignments

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Candidate:
    """run: see the file's words. prepare: weights as it wants to have them, before the clock starts. restore: gradients
    of those as gradients of the ones that were given. refuses: a reason not to run a shape, or None. is_ours: held to
    our own tolerance."""

    run: Callable[[Shape, Tensor, Tensor, Tensor, Weights], Tensor]
    prepare: Callable[[Weights], Weights] = dict
    restore: Callable[[Weights], Weights] = dict
    refuses: Callable[[Shape], str | None] = lambda shape: None
    is_ours: bool = False


def ours_fused(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """Our fused kernels, whatever `choose_layer_backend` would say."""
    return expert_layer(x, scores, sort_assignments(ids, shape.experts), weights, shape.activation)


def ours_grouped(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """Our operations around `F.grouped_mm`: what `expert_layer` does where it does not fuse."""
    by_expert = sort_assignments(ids, shape.experts)
    y_RD = expert_mlp(permute(x, by_expert), weights, by_expert.ends_G, shape.activation)
    return combine(y_RD, scores, by_expert)


def on_triton(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with every operation on Triton. Only around forward: the fused layer's backward is Triton's anyway."""

    def forced(*inputs: Any) -> Tensor:
        with backend.force_backend("triton"):
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
    """One expert after the other, operation by operation as transformers' eager experts."""
    out, scores = torch.zeros_like(x), scores.to(x.dtype)
    with torch.no_grad():
        chosen_EKT = F.one_hot(ids, shape.experts + 1).permute(2, 1, 0)
        hit = (chosen_EKT.sum(dim=(-1, -2)) > 0).nonzero()
    for (expert,) in hit:
        if expert == shape.experts:
            continue
        k, token = torch.where(chosen_EKT[expert])
        hidden = activated(F.linear(x[token], up_of(weights)[expert]), shape.activation)
        y = F.linear(hidden, weights["down_proj"][expert]) * scores[token, k].unsqueeze(-1)
        out.index_add_(0, token, y)
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
    """torchtitan's operations on one device: three products, float32 scores, and its deterministic scatter-add."""
    y, index = _torchtitan_rows(shape, x, ids, scores, weights)
    out: Tensor = _DeterministicScatterAdd.apply(torch.zeros_like(x), index, y)
    return out


def torchtitan_atomic(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """The same with torch's own scatter-add, which is faster and not the same in every run."""
    y, index = _torchtitan_rows(shape, x, ids, scores, weights)
    return torch.zeros_like(x).scatter_add(0, index, y)


def _torchtitan_rows(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """(weighted outputs [R, D], the token of each, [R, D])."""
    chosen_TE = torch.zeros(shape.tokens, shape.experts, dtype=torch.bool, device=x.device).scatter_(-1, ids, True)
    ends_E = chosen_TE.sum(dim=0).cumsum(0, dtype=torch.int32)
    order_R = ids.view(-1).argsort(stable=True)
    scores_R, token_R = scores.view(-1)[order_R], order_R // shape.top_k
    x_R = x[token_R]
    h = F.silu(F.grouped_mm(x_R, weights["w1"].transpose(1, 2), offs=ends_E))
    h = h * F.grouped_mm(x_R, weights["w3"].transpose(1, 2), offs=ends_E)
    y = F.grouped_mm(h, weights["w2"].transpose(1, 2), offs=ends_E)
    y = (y.float() * scores_R.unsqueeze(-1)).to(y.dtype)
    return y, token_R.unsqueeze(-1).expand_as(y)


class _DeterministicScatterAdd(torch.autograd.Function):
    """As `torchtitan.ops.scatter_add`: torch's, told to be deterministic; backward is a gather."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, index: Tensor, source: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return out.scatter_add(0, index, source)
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        return grad, None, grad.gather(0, *ctx.saved_tensors)


def split_matrices(weights: Weights) -> Weights:
    w1, w3 = (part.contiguous() for part in weights["gate_up_proj"].chunk(2, dim=1))
    return {"w1": w1, "w3": w3, "w2": weights["down_proj"]}


def joined_matrices(grads: Weights) -> Weights:
    return {"gate_up_proj": torch.cat([grads["w1"], grads["w3"]], dim=1), "down_proj": grads["w2"]}


def liger() -> Callable[..., Tensor]:
    """Liger-Kernel's fused MoE, tuned over the likely ones of its own configurations: it tries up to 40 for each of
    seven kernels and shape, and to compile all of them takes longer than everything else together."""
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    _tune_less("liger_kernel.ops.fused_moe_kernels")

    def run(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
        out: Tensor = function.apply(x, up_of(weights), weights["down_proj"], ids.int(), scores.to(x.dtype))
        return out

    return run


def _tune_less(module: str) -> None:
    """Of Triton's autotuners and of those that are made after them."""
    for kernel in vars(importlib.import_module(module)).values():
        if type(kernel).__name__ == "Autotuner" and len(kernel.configs) > 1:
            kernel.configs = [one for one in kernel.configs if _is_likely(one)] or kernel.configs


def _is_likely(one: Any) -> bool:
    """Of Liger's and SonicMoE's configurations: wide tiles, deep pipelines."""
    sizes = one.kwargs
    if "config" in sizes:
        of = sizes["config"]
        tile = (of.tile_m, of.tile_n, of.pingpong)
        is_wide = tile in ((128, 192, True), (128, 256, False), (256, 128, False), (256, 192, False))
        return is_wide and (of.device_capacity, of.cluster_m, of.cluster_n, of.swap_ab) == (9, 2, 1, False)
    if "BLOCK_H" in sizes:
        return one.num_warps == 4 and sizes["BLOCK_H"] in (256, 512) and sizes["BLOCK_K"] in (1, 4)
    if "BLOCK_M" in sizes:
        return (sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]) == (128, 128, 32)
    return (sizes["BLOCK_N"], sizes["BLOCK_K"]) == (128, 64) and one.num_stages in (3, 4)


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
    """SonicMoE by its entry for a routing that is given, as transformers calls it, tuned over the likely ones of its
    own configurations: it would compile dozens for each of six products and shape."""
    # It compiles so few faster by itself than in workers, each of which has to import torch first.
    os.environ.setdefault("QUACK_COMPILE_WORKERS", "1")
    kinds = importlib.import_module("sonicmoe.enums").ActivationType
    function = importlib.import_module("sonicmoe.functional").moe_general_routing_inputs
    _tune_less("sonicmoe.functional.reduction_over_k_gather")
    _tune_less("quack.gemm_interface")

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


def sorting_in_reason(shape: Shape) -> str | None:
    if shape.tokens * shape.top_k * shape.dim > 2**27:
        return "its deterministic scatter-add sorts every number of every row: for 2^27 of them at most"
    return gated_only(shape)


def few_tokens_only(shape: Shape) -> str | None:
    return None if shape.tokens <= 8192 else "a loop over experts that waits for the GPU: for 8,192 tokens at most"


def contenders() -> tuple[dict[str, Candidate], dict[str, str]]:
    """(name -> contender, name -> why it is not there)."""
    found = {
        "ours, fused": Candidate(on_triton(ours_fused), is_ours=True),
        "ours, grouped_mm": Candidate(ours_grouped, is_ours=True),
        "HF grouped_mm": Candidate(hf_grouped_mm),
        "torchtitan": Candidate(torchtitan, split_matrices, joined_matrices, sorting_in_reason),
        "torchtitan, atomic": Candidate(torchtitan_atomic, split_matrices, joined_matrices, gated_only),
        "HF eager": Candidate(eager_loop, refuses=few_tokens_only),
    }
    missing = {}
    for name, load in {"Liger": liger, "ScatterMoE": scattermoe, "SonicMoE": sonicmoe}.items():
        try:
            found[name] = Candidate(load(), refuses=gated_only)
        except Exception as error:  # whatever a package of others raises where it does not fit this machine
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
