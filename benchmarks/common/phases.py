"""Seconds of a training step, phase by phase."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from swiftmoe_lightning import SwiftMoEEngine
from swiftmoe_lightning.distributed import phase
from swiftmoe_lightning.engine.gradient_collector import GradientCollector
from swiftmoe_lightning.engine.sharded_layer import ShardedLayer
from swiftmoe_lightning.engine.slots import ExpertSlots


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

    def timed(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, charged to phase `name`."""

        def run(*args: Any) -> Any:
            with self.phase(name):
                return fn(*args)

        return run

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


@contextmanager
def engine_phases(engine: SwiftMoEEngine) -> Iterator[Stopwatch]:
    """A stopwatch that an engine's own phases are charged to, inside: count (all ranks' counts, before each layer),
    arrive (the wait for distributed weights), collect, place and distribute. A caller adds its own around them.

    Waiting for other ranks counts where it happens: a phase that communicates is charged for what made the ranks
    uneven before it.

    Args:
        engine: the only one that trains inside.
    """
    watch = Stopwatch()
    parts: tuple[tuple[Any, str, str], ...] = (
        (ShardedLayer, "begin_forward", "count"),
        (ExpertSlots, "start_distribution", "distribute"),
        (ExpertSlots, "finish_distribution", "arrive"),
        (GradientCollector, "on_gradients", "collect"),
        (GradientCollector, "collect", "collect"),
        (engine, "place", "place"),
        (engine, "distribute", "distribute"),
    )
    with ExitStack() as patches:
        for owner, method, name in parts:
            patches.enter_context(patch.object(owner, method, watch.timed(name, getattr(owner, method))))
        yield watch
