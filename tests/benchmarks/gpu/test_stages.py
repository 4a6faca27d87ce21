"""Ceilings and stages, on the CPU."""

from __future__ import annotations

from benchmarks.gpu import stages
from benchmarks.gpu.shapes import Shape
from tests.benchmarks.gpu.cases import CPU


def test_all_stages_and_ceilings_run() -> None:
    ceilings = stages.ceilings(CPU, elements=64, square=8)
    assert {"ms", "gb_per_s"} == ceilings["copy"].keys()
    rates = stages.measure_stages(Shape("tiny", 4, 16, 8, 2, 1, "gelu"), CPU, copy_gb_per_s=1.0)
    assert {"sort", "permute", "combine", "up", "down", "dz", "dx", "dW up", "dW down"} < rates.keys()
    assert all(("tflops" in rate) != ("share_of_copy" in rate) for rate in rates.values())
