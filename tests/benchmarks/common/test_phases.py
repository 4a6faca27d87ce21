"""A phase inside another stops the outer one's clock; named ranges are phases."""

from __future__ import annotations

import time

import pytest

from benchmarks.common.phases import Stopwatch, named_phases
from swiftmoe_lightning.distributed import phase


def test_each_second_is_charged_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(seconds: float) -> None:
        now[0] += seconds

    watch = Stopwatch()
    run(100.0)
    with watch.phase("forward"):
        run(1.0)
        with watch.phase("count"):
            run(10.0)
        run(2.0)
    run(100.0)
    with watch.phase("forward"):
        run(0.5)
    assert watch.seconds == {"forward": 3.5, "count": 10.0}
    assert watch.spans == {"forward": [3.0, 0.5], "count": [10.0]}


def test_named_ranges_are_charged_by_their_names() -> None:
    with named_phases() as watch, phase("plan"), phase("count"):
        pass
    with phase("place"):
        pass
    assert watch.seconds.keys() == {"plan", "count"}
    assert [len(spans) for spans in watch.spans.values()] == [1, 1]
