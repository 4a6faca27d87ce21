"""Blocks of steps, and two systems' blocks in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch.distributed as dist

from benchmarks.common.across_ranks import slowest, total
from benchmarks.common.spread import spread
from benchmarks.step.training import TrainingSystem
from swiftmoe_lightning import LoadReader


@dataclass
class Blocks:
    """Blocks of steps of one system: seconds of each block on this rank, and what all its steps did.

    Attributes:
        link_bytes: what this rank's node has sent over its link so far; None where there are no links.
    """

    link_bytes: Callable[[], int] | None = None
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    over_links: list[int] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    def run(self, system: TrainingSystem, steps: int) -> None:
        """One more block. It ends when its last weights have arrived, so the next block is not charged for them."""
        reader = None if system.engine is None else LoadReader(system.engine.module)
        wall, cpu, sent, over_links = 0.0, 0.0, _bytes_sent(system), self._over_links()
        dist.barrier()
        for step in range(steps):
            start = time.perf_counter(), time.process_time()
            system.step()
            if step == steps - 1:
                system.wait_for_weights()
            wall += time.perf_counter() - start[0]
            cpu += time.process_time() - start[1]
            # Outside the clocks' readings: reading the loads is no part of a step.
            if reader is not None:
                loads = reader.read().values()
                self.imbalance.append(float(np.mean([load.imbalance for load in loads])))
                self.moved.append(sum(load.num_moved for load in loads))
        system.check_routing()
        dist.barrier()
        self.wall.append(wall)
        self.cpu.append(cpu)
        self.sent.append(_bytes_sent(system) - sent)
        self.over_links.append(self._over_links() - over_links)

    def _over_links(self) -> int:
        return 0 if self.link_bytes is None else self.link_bytes()

    def summary(self, steps: int) -> dict[str, Any]:
        """A step's time, and what it did where that is known, over all blocks. A collective."""
        summary: dict[str, Any] = {
            "step_ms": spread(1e3 * np.array(slowest(self.wall)) / steps),
            "cpu_ms_per_step": spread(1e3 * np.array(total(self.cpu)) / steps),
        }
        sent = total([float(b) for b in self.sent])
        over_links = total([float(b) for b in self.over_links])
        if self.imbalance:
            summary |= {
                "weight_bytes_per_step": float(np.mean(sent)) / steps,
                "imbalance": float(np.mean(self.imbalance)),
                "pairs_moved_per_step": float(np.mean(self.moved)),
            }
        if self.link_bytes is not None:
            summary["link_bytes_per_step"] = float(np.mean(over_links)) / steps
        return summary


def _bytes_sent(system: TrainingSystem) -> int:
    return 0 if system.engine is None else sum(system.engine.traffic.values())


def take_turns(
    first: tuple[Blocks, TrainingSystem], second: tuple[Blocks, TrainingSystem], pairs: int, steps: int
) -> None:
    """Blocks of two systems: the one, the other, the other, the one, and so on, so that being first costs both alike.

    Args:
        first: where its blocks go, and the system.
        second: the same.
        pairs: each is two blocks of both, as `paired_ratio` takes them.
        steps: of a block.
    """
    for blocks, system in (first, second, second, first) * pairs:
        blocks.run(system, steps)
