"""The other implementations in the GPU benchmark: each computes the layer, if it is installed.

Liger and ScatterMoE run under Triton's interpreter where they are installed (with
`LIGER_FUSED_MOE_AUTOTUNE=0 TORCHDYNAMO_DISABLE=1`).
"""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import peers
from benchmarks.gpu.candidates import Candidate, candidates
from benchmarks.gpu.check import errors_of, outputs_and_gradients, reference
from benchmarks.gpu.shapes import Case, make_case
from tests.benchmarks.gpu.cases import TINY


def tiny_case(dtype: torch.dtype = torch.float32) -> Case:
    return make_case(TINY, "zipf", "cpu", dtype)


@pytest.mark.parametrize(
    "name",
    [
        *("ours, fused", "ours, grouped_mm", "HF grouped_mm", "torchtitan", "torchtitan, atomic", "HF eager"),
        *("plain grouped_mm", "Liger", "ScatterMoE"),
    ],
)
def test_every_candidate_computes_the_layer(name: str) -> None:
    installed = candidates()[0] | {"plain grouped_mm": Candidate(peers._plain_grouped_mm)}
    if name not in installed:
        pytest.skip(f"{name} is not installed")
    if name in ("Liger", "ScatterMoE") and os.environ.get("LIGER_FUSED_MOE_AUTOTUNE") != "0":
        pytest.skip(f"{name} would be tuned or compiled, which needs a GPU")
    case, candidate = tiny_case(), installed[name]
    weights = candidate.prepare(case.weights)
    outputs = outputs_and_gradients(case, candidate.run, weights, candidate.restore)
    errors = errors_of(outputs, reference(case, range(4)))
    assert errors.keys() == {"out", "x", "scores", "gate_up_proj", "down_proj"}
    assert max(errors.values()) < 1e-5


def configurations(**sizes: list[int]) -> list[SimpleNamespace]:
    """As Liger and SonicMoE list them: every combination. warps and stages are not sizes."""
    every = [dict(zip(sizes, values, strict=True)) for values in itertools.product(*sizes.values())]
    return [SimpleNamespace(num_warps=one.pop("warps"), num_stages=one.pop("stages"), kwargs=one) for one in every]


def test_few_of_the_many_configurations_of_others_are_tried() -> None:
    """The lists are those of Liger 0.8.5 and SonicMoE 0.1.2."""
    products = configurations(BLOCK_N=[64, 128], BLOCK_K=[32, 64], warps=[4, 8], stages=[2, 3, 4, 5])
    gradients = configurations(BLOCK_M=[64, 128], BLOCK_N=[64, 128], BLOCK_K=[16, 32], warps=[4, 8], stages=[2])
    sums = configurations(BLOCK_H=[256, 512, 1024, 2048, 4096], BLOCK_K=[1, 2, 4, 8], warps=[4, 8], stages=[4])
    kept = [sum(map(peers._is_likely, every)) for every in (products, gradients, sums)]
    assert kept == [4, 2, 4]


def test_sonicmoe_is_called_as_its_signature_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with SonicMoE 0.1.2's signature and layouts, as the package needs a GPU and Python 3.12."""

    def moe_general_routing_inputs(
        *inputs: Any, is_inference_mode_enabled: bool = False, concat_layout: bool = False
    ) -> tuple[Tensor, Tensor]:
        x, router_scores, token_indices, expert_indices, w1, b1, w2, b2, E, stream_id, activation_type, inference = (
            inputs
        )
        assert (b1, b2, E, stream_id, activation_type, inference) == (None, None, 4, 7, "swiglu", False)
        assert concat_layout
        assert router_scores.dtype == torch.float32
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert bool((token_indices.diff() >= 0).all())
        (double_hidden, dim, experts), ids = w1.shape, expert_indices.view(len(x), -1).long()
        assert (double_hidden, dim, experts) == (16, 16, 4)
        assert w2.shape == (16, 8, 4)
        weights = {"gate_up_proj": w1.permute(2, 0, 1), "down_proj": w2.permute(2, 0, 1)}
        out = peers.eager_loop(TINY, x, ids, router_scores.view(ids.shape), weights)
        return out, torch.bincount(expert_indices)

    modules = {
        "sonicmoe.enums": SimpleNamespace(ActivationType=SimpleNamespace(SWIGLU="swiglu")),
        "sonicmoe.functional": SimpleNamespace(moe_general_routing_inputs=moe_general_routing_inputs),
        "sonicmoe.functional.reduction_over_k_gather": SimpleNamespace(),
        "quack.gemm_interface": SimpleNamespace(),
    }
    monkeypatch.setattr(peers.importlib, "import_module", modules.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    case = tiny_case()
    outputs = outputs_and_gradients(case, peers.sonicmoe(), case.weights)
    assert max(errors_of(outputs, reference(case, range(4))).values()) < 1e-5
