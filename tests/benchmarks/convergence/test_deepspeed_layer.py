"""The emulated "deepspeed" system against the recorded losses of DeepSpeed's own MoE layer on two ranks."""

from __future__ import annotations

import json

import pytest

from benchmarks.common.provenance import RESULTS
from benchmarks.convergence.deepspeed_layer import NUM_STEPS, emulated


def test_has_the_losses_of_deepspeed() -> None:
    recorded = json.loads((RESULTS / "deepspeed_layer.json").read_text())["deepspeed_losses"]
    ours = emulated()
    assert len(recorded) == NUM_STEPS
    assert min(ours["dropped"]) > 0.1
    assert ours["losses"] == pytest.approx(recorded, abs=1e-4)
