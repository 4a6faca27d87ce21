"""The emulated "deepspeed" system against the recorded losses of DeepSpeed's own MoE layer on two ranks."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.provenance import RESULTS
from benchmarks.convergence.deepspeed_layer import NUM_STEPS, TOP_KS, emulated


@pytest.mark.parametrize("top_k", TOP_KS)
def test_has_the_losses_of_deepspeed(top_k: int) -> None:
    recorded = json.loads((RESULTS / "deepspeed_layer.json").read_text())[f"top-{top_k}"]["deepspeed_losses"]
    ours = emulated(top_k)
    assert len(recorded) == NUM_STEPS
    assert min(ours["dropped"]) > 0.05
    assert ours["losses"] == pytest.approx(recorded, abs=1e-5)
