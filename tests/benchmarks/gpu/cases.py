"""Small inputs for the GPU benchmark, and a clock that runs on a CPU."""

from __future__ import annotations

from benchmarks.gpu.measure import Clock
from benchmarks.gpu.shapes import Shape

TINY = Shape("tiny", 12, 16, 8, 4, 2)
CPU = Clock("cpu")
