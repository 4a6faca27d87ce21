"""Two things measured in turns: what else the machine does meets both, and being first costs both alike."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds_of(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turns(
    ours: Callable[[], float], theirs: Callable[[], float], pairs: int, warm_up: int
) -> tuple[list[float], list[float]]:
    """Measure theirs, ours, ours, theirs, theirs, ours, ...

    Args:
        ours: makes one measurement and returns it.
        theirs: the same of what ours is compared with.
        pairs: of the ratio that `paired_ratio` makes, each of two measurements of ours over two of theirs.
        warm_up: measurements of each that come first and are left out.

    Returns:
        2 * pairs measurements of ours, and of theirs, in the order in which they were made.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(2 * pairs + warm_up):
        for which in (0, 1) if turn % 2 else (1, 0):
            taken[which].append((ours, theirs)[which]())
    return taken[0][warm_up:], taken[1][warm_up:]
