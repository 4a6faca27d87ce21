"""What the step benchmark measures, on every rank: the cost of adapting, bytes, the update, phases of a step.

P (rank, expert) pairs, W ranks, G bytes of one expert.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common.across_ranks import slowest, total
from benchmarks.common.command_line import setting
from benchmarks.common.spread import paired_ratio, spread
from benchmarks.step.phases import time_phases
from benchmarks.step.workload import Sizes, TrainingLoop
from swiftmoe_lightning import LoadReader
from swiftmoe_lightning.distributed import local_shard
from swiftmoe_lightning.placement import plan_collection, plan_distribution

_WARM_UP_STEPS: Final = 3


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many measurements to make."""

    ranks: int = setting(4, "gloo processes")
    rounds: int = setting(6, "times that the two runs swap roles")
    pairs: int = setting(4, "measured in a round, two blocks of each run")
    steps: int = setting(2, "in a block")
    repeats: int = setting(50, "pairs of updates by each optimizer, and steps that are split into phases")


def measure(sizes: Sizes, effort: Effort) -> dict[str, Any]:
    """All measurements, by the result's keys. Every rank calls it; rank 0's is the result."""
    loops = TrainingLoop(sizes), TrainingLoop(sizes)
    return {
        **compare_placements(loops, effort.rounds, effort.pairs, effort.steps),
        "bytes": check_bytes(loops[0], effort.repeats),
        "update": time_update(sizes, None, effort.repeats),
        "update_fused": time_update(sizes, True, effort.repeats),
        "phases_ms": time_phases(loops, effort.repeats),
    }


@dataclass
class Blocks:
    """Blocks of steps of one role: seconds of each block on this rank, and what all its steps did."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    def run(self, loop: TrainingLoop, steps: int) -> None:
        """One more block. It ends when its last weights have arrived, so the next block is not charged for them."""
        reader = LoadReader(loop.module)
        wall, cpu = [], []
        sent = sum(loop.engine.traffic.values())
        dist.barrier()
        for step in range(steps):
            start = time.perf_counter(), time.process_time()
            loop.step()
            if step == steps - 1:
                loop.wait_for_weights()
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
            # Outside the clocks' readings: reading the loads is no part of a step.
            loads = reader.read().values()
            self.imbalance.append(float(np.mean([load.imbalance for load in loads])))
            self.moved.append(sum(load.num_moved for load in loads))
        self.wall.append(sum(wall))
        self.cpu.append(sum(cpu))
        self.sent.append(sum(loop.engine.traffic.values()) - sent)

    def summary(self, steps: int) -> dict[str, Any]:
        """A step's time and what it did, over all blocks. A collective."""
        return {
            "step_ms": spread(1e3 * np.array(slowest(self.wall)) / steps),
            "cpu_ms_per_step": spread(1e3 * np.array(total(self.cpu)) / steps),
            "bytes_sent_per_step": np.mean(total([float(b) for b in self.sent])) / steps,
            "imbalance": float(np.mean(self.imbalance)),
            "pairs_moved_per_step": float(np.mean(self.moved)),
        }


def compare_placements(loops: tuple[TrainingLoop, TrainingLoop], rounds: int, pairs: int, steps: int) -> dict[str, Any]:
    """The cost of a new placement in every step, over keeping one that was made once from the same popularity.

    In each round both first adapt for a few steps, then one stops: it keeps a placement as good as the other's. In
    the next round they swap roles. Blocks of `steps` steps alternate. The control is the same with both fixed: the
    distance of its ratio from 1 is the error of this machine's measurement. A collective.
    """
    results: dict[str, Any] = {}
    for name, adapts in (("adapting", True), ("control", False)):
        run, baseline = Blocks(), Blocks()
        for number in range(rounds):
            roles = loops if number % 2 == 0 else loops[::-1]
            for loop, adapts_on in zip(roles, (adapts, False), strict=True):
                loop.set_adapting(every_step=True)
                for _ in range(_WARM_UP_STEPS):
                    loop.step()
                loop.set_adapting(every_step=adapts_on)
                loop.step()
                loop.wait_for_weights()
            order = (run, roles[0]), (baseline, roles[1])
            for blocks, loop in (*order, *order[::-1]) * pairs:
                blocks.run(loop, steps)
        results[name] = {
            "wall_ratio": paired_ratio(slowest(run.wall), slowest(baseline.wall)),
            "cpu_ratio": paired_ratio(total(run.cpu), total(baseline.cpu)),
            "run": run.summary(steps),
            "baseline": baseline.summary(steps),
        }
    return results


def check_bytes(loop: TrainingLoop, steps: int) -> dict[str, Any]:
    """Bytes counted on the wire against the plans, rank by rank and step by step, and their sum over ranks against
    G * (P - P / W) a layer and phase. A collective.

    Raises AssertionError where they differ. W must divide the rows of an expert's tensors.
    """
    engine, rank, world_size = loop.engine, dist.get_rank(), dist.get_world_size()
    parameters = engine.layers[0].experts.expert_parameters().values()
    row_elements, size = [(p.shape[1], p.shape[2:].numel()) for p in parameters], torch.float32.itemsize
    elements = sum(rows * columns for rows, columns in row_elements)
    plans = {"collect": plan_collection, "distribute": plan_distribution}
    loop.set_adapting(every_step=True)
    loop.step()
    counted, formula = [], []
    for _ in range(steps):
        before, placements = engine.traffic, {"collect": [layer.placement for layer in engine.layers]}
        loop.step()
        placements["distribute"] = [layer.placement for layer in engine.layers]
        for phase, plan in plans.items():
            sent = engine.traffic[phase] - before[phase]
            planned = size * sum(plan(p, row_elements).elements_sent(rank) for p in placements[phase])
            assert sent == planned, (phase, rank, sent, planned)
            num_pairs = sum(p.num_pairs for p in placements[phase])
            counted.append(float(sent))
            formula.append(size * elements * num_pairs * (world_size - 1) / world_size)
    all_ranks = total(counted)
    assert all_ranks == formula, (all_ranks, formula)
    return {
        "steps_checked": steps,
        "elements_per_expert": elements,
        "num_pairs": num_pairs,
        "collect_all_ranks": all_ranks[-2],
        "distribute_all_ranks": all_ranks[-1],
        "formula_all_ranks": formula[-1],
    }


def time_update(sizes: Sizes, fused: bool | None, repeats: int) -> dict[str, Any]:
    """`step()` of a prepared AdamW over sharded and dense parameters, without placing and distributing, over that of
    stock AdamW on plain tensors of the same local shapes, values and gradients. Rank 0 measures; the others wait."""
    loop = TrainingLoop(sizes, fused=fused)
    loop.forward().backward()
    plain = []
    for parameter in loop.module.parameters():
        copy = nn.Parameter(local_shard(parameter).detach().clone())
        assert parameter.grad is not None
        copy.grad = local_shard(parameter.grad).clone()
        plain.append(copy)
    stock = torch.optim.AdamW(plain, lr=1e-4, fused=fused)
    prepared_ms: list[tuple[float, float]] = []
    stock_ms: list[tuple[float, float]] = []
    # The update has no communication, so one rank can run it while the others leave the machine idle.
    with patch.object(loop.engine, "after_update", lambda *_: None):
        order = (loop.optimizer, prepared_ms), (stock, stock_ms)
        for optimizer, times in (*order, *order[::-1]) * (_WARM_UP_STEPS + repeats):
            if dist.get_rank() == 0:
                start = time.perf_counter(), time.thread_time()
                optimizer.step()
                times.append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.thread_time() - start[1])))
    dist.barrier()
    if dist.get_rank():
        return {}
    (prepared_wall, prepared_cpu), (stock_wall, stock_cpu) = (
        np.array(times[2 * _WARM_UP_STEPS :]).T for times in (prepared_ms, stock_ms)
    )
    return {
        "wall_ratio": paired_ratio(prepared_wall, stock_wall),
        "cpu_ratio": paired_ratio(prepared_cpu, stock_cpu),
        "prepared_cpu_ms": spread(prepared_cpu),
        "stock_cpu_ms": spread(stock_cpu),
        "tensors": len(plain),
        "elements": sum(p.numel() for p in plain),
    }
