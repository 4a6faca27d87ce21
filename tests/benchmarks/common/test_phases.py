"""A phase inside another stops the outer one's clock."""

from __future__ import annotations

import time

import pytest

from benchmarks.common.phases import Stopwatch


def test_each_second_is_charged_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run(seconds: float) -> str:
        now[0] += seconds
        return "done"

    watch = Stopwatch()
    run(100.0)
    with watch.phase("forward"):
        run(1.0)
        assert watch.timed("count", run)(10.0) == "done"
        run(2.0)
    run(100.0)
    with watch.phase("forward"):
        run(0.5)
    assert watch.seconds == {"forward": 3.5, "count": 10.0}
