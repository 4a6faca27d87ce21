"""Two things are measured alternately, so that being first costs both alike."""

from __future__ import annotations

from benchmarks.common.interleaved import interleaved, seconds_of


def test_measurements_alternate_and_the_warm_up_is_left_out() -> None:
    calls: list[str] = []

    def measure(name: str) -> float:
        calls.append(name)
        return len(calls)

    ours, theirs = interleaved(lambda: measure("ours"), lambda: measure("theirs"), pairs=1, warm_up=2)
    assert calls == ["theirs", "ours", "ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert (ours, theirs) == ([6, 7], [5, 8])


def test_seconds_are_wall_time() -> None:
    assert 0 <= seconds_of(lambda: None) < 1
