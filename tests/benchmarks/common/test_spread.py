"""Medians with their spread, and ratios of what was measured alternately."""

from __future__ import annotations

import math

import pytest

from benchmarks.common.spread import median_of, paired_ratio, spread


def test_spread_is_the_median_with_percentiles() -> None:
    assert spread(list(range(11))) == {"median": 5.0, "p10": 1.0, "p90": 9.0, "count": 11}


def test_ratio_is_of_neighbouring_pairs() -> None:
    """(1 + 3) / (1 + 1) and (2 + 2) / (4 + 4)."""
    ratio = paired_ratio([1, 3, 2, 2], [1, 1, 4, 4])
    assert (ratio["median"], ratio["count"]) == (1.25, 2)
    assert (ratio["low"], ratio["high"]) == (0.5, 2.0)
    assert ratio["p10"] == pytest.approx(0.65)


def test_the_median_over_seeds() -> None:
    assert median_of([0.3, 0.1, 0.2]) == {"median": 0.2, "min": 0.1, "max": 0.3, "runs": 3}
    assert median_of([0.3, -math.inf, 0.2]) == {"median": 0.2, "min": None, "max": 0.3, "runs": 3}
    assert median_of([-math.inf, -math.inf]) == {"median": None, "min": None, "max": None, "runs": 2}
