"""What runs in the GPU benchmark: our layer on each path, and peers, as far as they are installed.

All get the same inputs; none gets a router's work done before. T tokens, D model dim, E experts, K top-k, R = T * K.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.shapes import Shape, Weights
from swiftmoe_lightning.ops import backend, combine, expert_layer, expert_mlp, permute, sort_assignments

# The baseline of all ratios.
OURS_FUSED: Final = "ours, fused"
OURS_GROUPED: Final = "ours, grouped_mm"


@dataclass(frozen=True)
class Candidate:
    """One way to compute the layer.

    Attributes:
        run: (shape, x [T, D], expert ids [T, K] int64, scores [T, K] float32, weights) -> [T, D].
        prepare: weights as it wants to have them, before the clock starts.
        restore: gradients of those as gradients of the ones that were given.
        refuses: a reason not to run a shape, or None.
        is_ours: must meet our own tolerance.
    """

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


def candidates() -> tuple[dict[str, Candidate], dict[str, str]]:
    """(name -> candidate, name -> why it is not there)."""
    split, joined = peers.split_matrices, peers.joined_matrices
    installed = {
        OURS_FUSED: Candidate(on_triton(ours_fused), is_ours=True),
        OURS_GROUPED: Candidate(ours_grouped, is_ours=True),
        "HF grouped_mm": Candidate(peers.hf_grouped_mm),
        "torchtitan": Candidate(peers.torchtitan, split, joined, peers.sorting_in_reason),
        "torchtitan, atomic": Candidate(peers.torchtitan_atomic, split, joined, peers.gated_only),
        "HF eager": Candidate(peers.eager_loop, refuses=peers.few_tokens_only),
    }
    missing = {}
    for name, load in {"Liger": peers.liger, "ScatterMoE": peers.scattermoe, "SonicMoE": peers.sonicmoe}.items():
        try:
            installed[name] = Candidate(load(), refuses=peers.gated_only)
        except Exception as error:  # whatever a package of others raises where it does not fit this machine
            missing[name] = f"{type(error).__name__}: {error}"
    return installed, missing
