"""Medians with their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np

_RESAMPLES: Final = 2000


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 10th and 90th percentile, and how many values there are."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "count": len(values)}


def pair_ratios(values: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> np.ndarray:
    """[pairs] the ratios of `paired_ratio`."""
    return np.reshape(values, (-1, 2)).sum(1) / np.reshape(baseline, (-1, 2)).sum(1)


def paired_ratio(values: Sequence[float] | np.ndarray, baseline: Sequence[float] | np.ndarray) -> dict[str, float]:
    """`values` over `baseline`, which were measured alternately: value, baseline, baseline, value, ...

    Two neighbours of each make one pair, so that being first costs both alike. Returns the spread of the pairs'
    ratios, and in "low" and "high" where their median lies with 95 % confidence (bootstrap over pairs, always with
    the same draws).
    """
    ratios = pair_ratios(values, baseline)
    resamples = np.random.default_rng(0).choice(ratios, (_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(resamples, axis=1), [2.5, 97.5])
    return {**spread(ratios), "low": float(low), "high": float(high)}


def median_of(values: Sequence[float]) -> dict[str, float | int | None]:
    """Median, least, most and number of some runs' values, JSON-able: None where a value is not finite."""

    def number(value: float) -> float | None:
        return round(float(value), 4) if math.isfinite(value) else None

    ordered = sorted(values)
    middle = float(np.median(ordered)) if math.isfinite(ordered[0]) else ordered[len(ordered) // 2]
    return {"median": number(middle), "min": number(ordered[0]), "max": number(ordered[-1]), "runs": len(ordered)}
