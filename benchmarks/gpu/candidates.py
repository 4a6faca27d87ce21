"""What runs in the GPU benchmark: our layer on each backend, and the peers that are installed.

All get the same inputs, and each does all the work behind the router itself.
T tokens, D model dim, E experts, K top-k, R = T * K.
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
        prepare: brings the weights into its layout, before the clock starts.
        restore: brings gradients of that layout back into the layout of the weights that were given.
        refuses: shape -> the reason not to run it, or None.
        is_ours: whether it must meet our own, tighter tolerance.
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
    """Our operations around `F.grouped_mm`, as `expert_layer` runs where it does not fuse."""
    by_expert = sort_assignments(ids, shape.experts)
    y_RD = expert_mlp(permute(x, by_expert), weights, by_expert.ends_G, shape.activation)
    return combine(y_RD, scores, by_expert)


def on_triton(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same with every operation on Triton. Only around forward: the fused layer's backward is Triton's anyway."""

    def on_triton_alone(*inputs: Any) -> Tensor:
        with backend.force_backend("triton"):
            return run(*inputs)

    return on_triton_alone


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
        except Exception as error:  # a peer's package may raise anything on a machine that it does not fit
            missing[name] = f"{type(error).__name__}: {error}"
    return installed, missing
