"""Two things measured alternately, so that other work on the machine, and being first, cost both alike."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def cpu_seconds_of(action: Callable[[], object]) -> float:
    """Processor time of one call, of this thread: what shares the core with it is not counted."""
    start = time.thread_time()
    action()
    return time.thread_time() - start


def interleaved(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int, warm_up: int
) -> tuple[list[float], list[float]]:
    """Measure theirs, ours, ours, theirs, theirs, ours, ...

    Args:
        ours: makes one measurement and returns it.
        theirs: the same of what ours is compared with.
        pairs: how many pairs `paired_ratio` makes of them, each of two measurements of ours over two of theirs.
        warm_up: measurements of each that come before and are left out.

    Returns:
        2 * pairs measurements of ours, and of theirs, in the order in which they were made.
    """
    ours_measured: list[float] = []
    theirs_measured: list[float] = []
    both = (theirs, theirs_measured), (ours, ours_measured)
    for number in range(2 * pairs + warm_up):
        for measure, measured in both[::-1] if number % 2 else both:
            measured.append(measure())
    return ours_measured[warm_up:], theirs_measured[warm_up:]
