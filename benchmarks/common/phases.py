"""Seconds of a training step, phase by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from swiftmoe_lightning import SwiftMoEEngine
from swiftmoe_lightning.engine.gradient_collector import GradientCollector
from swiftmoe_lightning.engine.sharded_layer import ShardedLayer
from swiftmoe_lightning.engine.slots import ExpertSlots


class Stopwatch:
    """Seconds by phase; a phase inside another stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is charged to phase `name`."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def timed(self, name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn`, charged to phase `name`."""

        def run(*args: Any) -> Any:
            with self.phase(name):
                return fn(*args)

        return run

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


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
        (ExpertSlots, "finish_distribution", "arrive"),
        (GradientCollector, "collect", "collect"),
        (engine, "place", "place"),
        (engine, "distribute", "distribute"),
    )
    with ExitStack() as patches:
        for owner, method, name in parts:
            patches.enter_context(patch.object(owner, method, watch.timed(name, getattr(owner, method))))
        yield watch
