"""Other implementations of the layer, as far as they are installed, and why one does not run a shape.

Each takes a shape, x [T, D], expert ids [T, K] int64, scores [T, K] float32 and weights, and returns [T, D].
T tokens, D model dim, F hidden dim, E experts, K top-k, R = T * K.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.shapes import Shape, Weights, activated, up_weight


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
        hidden = activated(F.linear(x[token], up_weight(weights)[expert]), shape.activation)
        y = F.linear(hidden, weights["down_proj"][expert]) * scores[token, k].unsqueeze(-1)
        out.index_add_(0, token, y)
    return out


def hf_grouped_mm(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
    """transformers' default: its own function where that is installed, else the same operations in the same order."""
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
    z = F.grouped_mm(x[perm_R // shape.top_k], up_weight(weights).transpose(1, 2), offs=ends_E)
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
    """As torchtitan has them: gate and up apart, under its names."""
    w1, w3 = (part.contiguous() for part in weights["gate_up_proj"].chunk(2, dim=1))
    return {"w1": w1, "w3": w3, "w2": weights["down_proj"]}


def joined_matrices(grads: Weights) -> Weights:
    """Gradients of `split_matrices` as those of the weights that were split."""
    return {"gate_up_proj": torch.cat([grads["w1"], grads["w3"]], dim=1), "down_proj": grads["w2"]}


def liger() -> Callable[..., Tensor]:
    """Liger-Kernel's fused MoE, tuned over the likely ones of its own configurations: it tries up to 40 for each of
    seven kernels and shape, and to compile all of them takes longer than everything else together."""
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    _tune_less("liger_kernel.ops.fused_moe_kernels")

    def run(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
        out: Tensor = function.apply(x, up_weight(weights), weights["down_proj"], ids.int(), scores.to(x.dtype))
        return out

    return run


def _tune_less(module: str) -> None:
    """Let the autotuners of `module`, present and to come, try the likely configurations alone."""
    for kernel in vars(importlib.import_module(module)).values():
        if type(kernel).__name__ == "Autotuner" and len(kernel.configs) > 1:
            kernel.configs = [config for config in kernel.configs if _is_likely(config)] or kernel.configs


def _is_likely(config: Any) -> bool:
    """Whether a configuration of Liger's or SonicMoE's has wide tiles and a deep pipeline."""
    sizes = config.kwargs
    if "config" in sizes:
        gemm = sizes["config"]
        tile = (gemm.tile_m, gemm.tile_n, gemm.pingpong)
        is_wide = tile in ((128, 192, True), (128, 256, False), (256, 128, False), (256, 192, False))
        return is_wide and (gemm.device_capacity, gemm.cluster_m, gemm.cluster_n, gemm.swap_ab) == (9, 2, 1, False)
    if "BLOCK_H" in sizes:
        return config.num_warps == 4 and sizes["BLOCK_H"] in (256, 512) and sizes["BLOCK_K"] in (1, 4)
    if "BLOCK_M" in sizes:
        return (sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"]) == (128, 128, 32)
    return (sizes["BLOCK_N"], sizes["BLOCK_K"]) == (128, 64) and config.num_stages in (3, 4)


def scattermoe() -> Callable[..., Tensor]:
    """ScatterMoE's two parallel linears."""
    module = importlib.import_module("scattermoe.parallel_experts")
    sort, linear = module.flatten_sort_count, module.parallel_linear

    def run(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
        order = sort(ids, num_experts=shape.experts)
        z = linear(x, up_weight(weights).transpose(1, 2), shape.top_k, *order, grouped_out=True)
        w2 = weights["down_proj"].transpose(1, 2)
        gates = scores.to(x.dtype)
        out: Tensor = linear(activated(z, shape.activation), w2, 1, *order, grouped_in=True, gates=gates)
        return out

    return run


def sonicmoe() -> Callable[..., Tensor]:
    """SonicMoE by its entry point for a given routing, as transformers calls it, tuned over the likely ones of its
    own configurations: it would compile dozens for each of six products and shape."""
    # So few compile faster in this process than in workers, each of which has to import torch first.
    os.environ.setdefault("QUACK_COMPILE_WORKERS", "1")
    activations = importlib.import_module("sonicmoe.enums").ActivationType
    function = importlib.import_module("sonicmoe.functional").moe_general_routing_inputs
    _tune_less("sonicmoe.functional.reduction_over_k_gather")
    _tune_less("quack.gemm_interface")

    def run(shape: Shape, x: Tensor, ids: Tensor, scores: Tensor, weights: Weights) -> Tensor:
        token_R = torch.arange(shape.tokens, device=x.device, dtype=torch.int32).repeat_interleave(shape.top_k)
        w1, w2 = up_weight(weights).permute(1, 2, 0), weights["down_proj"].permute(1, 2, 0)
        stream = torch.cuda.current_stream().cuda_stream
        result = function(
            *(x, scores.flatten(), token_R, ids.flatten().int(), w1, None, w2, None, shape.experts, stream),
            *(activations.SWIGLU, False),
            concat_layout=True,
        )
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return run


def gated_only(shape: Shape) -> str | None:
    """Why a peer without plain activations does not run this shape."""
    return None if shape.activation == "swiglu" else "for gated experts only"


def sorting_in_reason(shape: Shape) -> str | None:
    """Why torchtitan's deterministic scatter-add does not run this shape."""
    if shape.tokens * shape.top_k * shape.dim > 2**27:
        return "its deterministic scatter-add sorts every number of every row: for 2^27 of them at most"
    return gated_only(shape)


def few_tokens_only(shape: Shape) -> str | None:
    """Why a loop over experts does not run this shape."""
    return None if shape.tokens <= 8192 else "a loop over experts that waits for the GPU: for 8,192 tokens at most"
