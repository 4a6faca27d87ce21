"""Bytes by the plan, on traces."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.step.exchanges import bytes_over_paper, synthetic_traces
from swiftmoe_lightning.analysis import Trace


def test_bytes_are_of_both_phases_over_the_papers() -> None:
    # Two experts of equal popularity on two ranks of a slot. Ours: P = 2, so 2 * (2 - 2 / 2) G. The paper's: gradients
    # (2 * 2 - 2 - 2 / 2) G, weights 2 * (1 - 1 / 2) G.
    trace = Trace(np.full((3, 1, 1, 2), 8))
    assert bytes_over_paper([trace], 2, 1) == {"median": 1.0, "min": 1.0, "max": 1.0, "runs": 1}


def test_drawn_traces_move_and_differ_in_how_uneven_they_are() -> None:
    traces = synthetic_traces(3, steps=5)
    assert [trace.popularity_ULE.shape for trace in traces] == [(5, 2, 16)] * 3
    largest = [float(trace.popularity_ULE.max(2).mean()) for trace in traces]
    assert largest == sorted(largest)
    shares_ULE = traces[1].popularity_ULE / traces[1].popularity_ULE.sum(2, keepdims=True)
    moved = np.abs(np.diff(shares_ULE, axis=0)).sum(2).mean() / 2
    assert moved == pytest.approx(0.1, abs=0.06)
