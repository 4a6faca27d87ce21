"""Seconds of a training step, phase by phase."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from swiftmoe_lightning.distributed import phase


class Stopwatch:
    """Seconds by phase; a phase inside another stops the outer one's clock.

    Attributes:
        seconds: phase -> seconds, but for those that still run.
        spans: phase -> the seconds of each time that it ran, in order.
    """

    def __init__(self) -> None:
        self.spans: defaultdict[str, list[float]] = defaultdict(list)
        self._running: list[float] = []
        self._since = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        return {name: sum(spans) for name, spans in self.spans.items()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is charged to phase `name`."""
        self._charge()
        self._running.append(0.0)
        try:
            yield
        finally:
            self._charge()
            self.spans[name].append(self._running.pop())

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._running[-1] += now - self._since
        self._since = now


@contextmanager
def named_phases() -> Iterator[Stopwatch]:
    """A stopwatch that every named range of the package is charged to, inside: "collect" for "swiftmoe::collect".

    As a profiler sees them, but on this thread alone, and without a profiler's own cost.
    """
    watch = Stopwatch()

    def charge(name: str) -> AbstractContextManager[None]:
        return watch.phase(name.removeprefix("swiftmoe::"))

    # The function `phase` hides its module in the package.
    with patch.object(sys.modules[phase.__module__], "record_function", charge):
        yield watch
