"""Figures over seeds, by literals."""

from __future__ import annotations

import math

from benchmarks.convergence.comparison import median_of


def test_the_median_over_seeds() -> None:
    assert median_of([0.3, 0.1, 0.2]) == {"median": 0.2, "min": 0.1, "max": 0.3, "runs": 3}
    assert median_of([0.3, -math.inf, 0.2]) == {"median": 0.2, "min": None, "max": 0.3, "runs": 3}
    assert median_of([-math.inf, -math.inf]) == {"median": None, "min": None, "max": None, "runs": 2}
