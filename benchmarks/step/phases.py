"""The time of a step, phase by phase."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch.distributed as dist

from benchmarks.common.across_ranks import total
from benchmarks.common.spread import spread
from benchmarks.step.workload import TrainingLoop
from swiftmoe_lightning.engine.gradient_collector import GradientCollector


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


def time_phases(loops: tuple[TrainingLoop, TrainingLoop], steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each phase of a step, adapting and with a fixed placement, mean over ranks. A collective.

    Waiting for other ranks counts where it happens: a phase that communicates is charged for what made the ranks
    uneven before it.
    """
    by_phase: dict[str, defaultdict[str, list[float]]] = {}
    for loop, (role, adapts) in zip(loops, (("adapting", True), ("fixed", False)), strict=True):
        loop.set_adapting(every_step=True)
        loop.step()
        loop.set_adapting(every_step=adapts)
        loop.step()
        loop.wait_for_weights()
        by_phase[role] = defaultdict(list)
    for _ in range(steps):
        for loop, phases in zip(loops, by_phase.values(), strict=True):
            dist.barrier()
            for name, seconds in _timed_step(loop).items():
                phases[name].append(1e3 * seconds)
    world_size = dist.get_world_size()
    return {
        role: {name: spread(np.array(total(phases[name])) / world_size) for name in sorted(phases)}
        for role, phases in by_phase.items()
    }


def _timed_step(loop: TrainingLoop) -> dict[str, float]:
    """Seconds of each phase of one step on this rank; the weights' arrival is waited for at the end."""
    engine, watch = loop.engine, Stopwatch()
    with ExitStack() as patches:
        for owner, name in ((GradientCollector, "collect"), (engine, "place"), (engine, "distribute")):
            patches.enter_context(patch.object(owner, name, watch.timed(name, getattr(owner, name))))
        with watch.phase("forward"):
            loss = loop.forward()
        with watch.phase("backward"):
            loss.backward()
        with watch.phase("clip"):
            engine.clip_grad_norm_(1.0)
        with watch.phase("update"):
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        with watch.phase("arrive"):
            loop.wait_for_weights()
    return watch.seconds
