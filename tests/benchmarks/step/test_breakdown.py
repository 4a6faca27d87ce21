"""Shares of a step by its phases, by literals."""

from __future__ import annotations

import pytest

from benchmarks.step.breakdown import control_fraction, phases_ms, weight_phases_fraction

# Two ranks. The second one comes late to the first exchange of counts, the first one to the second.
STEP = [
    {
        "other": [6.0],
        "plan": [0.25, 0.25],
        "place": [0.5],
        "count": [2.0, 0.5],
        "collect": [0.25],
        "distribute": [0.25],
    },
    {
        "other": [6.0],
        "plan": [0.25, 0.25],
        "place": [0.5],
        "count": [0.5, 2.0],
        "collect": [0.25],
        "distribute": [0.25],
    },
]


def test_phases_are_means_over_ranks() -> None:
    measured = phases_ms([STEP, [{"other": [1.0]}, {"other": [3.0]}]])
    assert measured["count"]["median"] == pytest.approx(1e3 * (2.5 + 0.0) / 2)
    assert (measured["other"]["p10"], measured["other"]["count"]) == (pytest.approx(2400.0), 2)


def test_the_weight_phases_are_what_collect_and_distribute_take() -> None:
    assert weight_phases_fraction([STEP, STEP]) == {"median": 0.05, "min": 0.05, "max": 0.05, "runs": 2}


def test_control_is_plan_and_place_and_counting_beyond_the_splits() -> None:
    # A second for plan and place, and two halves for counting: who waits for the other does not count.
    fraction = control_fraction([STEP], split_seconds=0.5)
    assert fraction == {"median": 0.15, "min": 0.15, "max": 0.15, "runs": 1}
    # Counting is not faster than the exchange of splits, only measured so.
    assert control_fraction([STEP], split_seconds=2.0)["median"] == 0.1


def test_phases_without_names_have_no_share() -> None:
    assert weight_phases_fraction([[{"other": [1.0], "collect": [1.0]}]]) is None
    assert control_fraction([[{"other": [1.0], "plan": [1.0], "place": [1.0]}]], 0.0) is None
