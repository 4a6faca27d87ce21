"""The time of a step, phase by phase."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch.distributed as dist

from benchmarks.common.across_ranks import total
from benchmarks.common.phases import engine_phases
from benchmarks.common.spread import spread
from benchmarks.step.workload import TrainingLoop


def time_phases(loops: tuple[TrainingLoop, TrainingLoop], steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds of each phase of a step, adapting and with a fixed placement, mean over ranks. A collective."""
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
    with engine_phases(loop.engine) as watch:
        with watch.phase("forward"):
            loss = loop.forward()
        with watch.phase("backward"):
            loss.backward()
        with watch.phase("clip"):
            loop.engine.clip_grad_norm_(1.0)
        with watch.phase("update"):
            loop.optimizer.step()
            loop.optimizer.zero_grad()
        loop.wait_for_weights()
    return watch.seconds
