"""What `bench_step` measures, on every rank: the cost of adapting, bytes, the optimizer's update, phases of a step.

D hosted (rank, expert) pairs, W ranks, G elements of one expert.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.ranks import slowest, total
from benchmarks.spread import paired_ratio, spread
from benchmarks.workload import Sizes, Trainee
from swiftmoe_lightning import LoadReader
from swiftmoe_lightning.distributed import local_shard
from swiftmoe_lightning.placement import plan_collection, plan_distribution

_WARM_UP_STEPS: Final = 3


@dataclass
class Blocks:
    """Blocks of steps of one role: seconds of each block on this rank, and the books of all its steps."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    imbalance: list[float] = field(default_factory=list)
    moved: list[int] = field(default_factory=list)

    def run(self, trainee: Trainee, steps: int) -> None:
        """One more block. It ends when its last weights have arrived, so the next block is not charged for them."""
        reader = LoadReader(trainee.module)
        wall, cpu = [], []
        sent = sum(trainee.engine.traffic.values())
        dist.barrier()
        for step in range(steps):
            start = time.perf_counter(), time.process_time()
            trainee.step()
            if step == steps - 1:
                trainee.settle()
            wall.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
            # Between the clocks' readings: looking at the loads is no part of a step.
            loads = reader.read().values()
            self.imbalance.append(float(np.mean([load.imbalance for load in loads])))
            self.moved.append(sum(load.num_moved for load in loads))
        self.wall.append(sum(wall))
        self.cpu.append(sum(cpu))
        self.sent.append(sum(trainee.engine.traffic.values()) - sent)

    def books(self, steps: int) -> dict[str, Any]:
        """A step's time and what it did, over all blocks. A collective."""
        return {
            "step_ms": spread(1e3 * np.array(slowest(self.wall)) / steps),
            "cpu_ms_per_step": spread(1e3 * np.array(total(self.cpu)) / steps),
            "bytes_sent_per_step": np.mean(total([float(b) for b in self.sent])) / steps,
            "imbalance": float(np.mean(self.imbalance)),
            "pairs_moved_per_step": float(np.mean(self.moved)),
        }


def compare_placements(trainees: tuple[Trainee, Trainee], rounds: int, pairs: int, steps: int) -> dict[str, Any]:
    """The cost of a new placement in every step, over keeping one that was made once from the same popularity.

    In each round both first adapt for a few steps, then one stops: it keeps a placement as good as the other's. In
    the next round they swap roles. Blocks of `steps` steps take turns. The control is the same with both fixed: how
    far its ratio is from 1 is how well the machine can tell. A collective.
    """
    results: dict[str, Any] = {}
    for name, adapts in (("adapting", True), ("control", False)):
        run, baseline = Blocks(), Blocks()
        for number in range(rounds):
            roles = trainees if number % 2 == 0 else trainees[::-1]
            for trainee, goes_on in zip(roles, (adapts, False), strict=True):
                trainee.adapt(every_step=True)
                for _ in range(_WARM_UP_STEPS):
                    trainee.step()
                trainee.adapt(every_step=goes_on)
                trainee.step()
                trainee.settle()
            turns = (run, roles[0]), (baseline, roles[1])
            for blocks, trainee in (*turns, *turns[::-1]) * pairs:
                blocks.run(trainee, steps)
        results[name] = {
            "wall_ratio": paired_ratio(slowest(run.wall), slowest(baseline.wall)),
            "cpu_ratio": paired_ratio(total(run.cpu), total(baseline.cpu)),
            "run": run.books(steps),
            "baseline": baseline.books(steps),
        }
    return results


def check_bytes(trainee: Trainee, steps: int) -> dict[str, Any]:
    """Bytes counted on the wire against the plans, rank by rank and step by step, and their sum over ranks against
    G * (D - D / W) a layer and phase. A collective.

    Raises AssertionError where they differ. W must divide the rows of an expert's tensors.
    """
    engine, rank, world_size = trainee.engine, dist.get_rank(), dist.get_world_size()
    parameters = engine.layers[0].experts.expert_parameters().values()
    row_elements, size = [(m.shape[1], m.shape[2:].numel()) for m in parameters], torch.float32.itemsize
    elements = sum(rows * columns for rows, columns in row_elements)
    plans = {"collect": plan_collection, "distribute": plan_distribution}
    trainee.adapt(every_step=True)
    trainee.step()
    counted, formula = [], []
    for _ in range(steps):
        before, placements = engine.traffic, {"collect": [layer.placement for layer in engine.layers]}
        trainee.step()
        placements["distribute"] = [layer.placement for layer in engine.layers]
        for phase, plan in plans.items():
            sent = engine.traffic[phase] - before[phase]
            planned = size * sum(plan(p, row_elements).elements_sent(rank) for p in placements[phase])
            assert sent == planned, (phase, rank, sent, planned)
            hosted = sum(p.num_pairs for p in placements[phase])
            counted.append(float(sent))
            formula.append(size * elements * hosted * (world_size - 1) / world_size)
    of_all = total(counted)
    assert of_all == formula, (of_all, formula)
    return {
        "steps_checked": steps,
        "elements_per_expert": elements,
        "hosted_pairs": hosted,
        "collect_all_ranks": of_all[-2],
        "distribute_all_ranks": of_all[-1],
        "formula_all_ranks": formula[-1],
    }


def time_update(sizes: Sizes, fused: bool | None, repeats: int) -> dict[str, Any]:
    """`step()` of a prepared AdamW over sharded and dense parameters, without placing and distributing, over that of
    stock AdamW on plain tensors of the same local shapes, values and gradients. Rank 0 measures; the others wait."""
    trainee = Trainee(sizes, fused=fused)
    trainee.forward().backward()
    plain = []
    for parameter in trainee.module.parameters():
        copy = nn.Parameter(local_shard(parameter).detach().clone())
        assert parameter.grad is not None
        copy.grad = local_shard(parameter.grad).clone()
        plain.append(copy)
    stock = torch.optim.AdamW(plain, lr=1e-4, fused=fused)
    prepared_ms: list[tuple[float, float]] = []
    stock_ms: list[tuple[float, float]] = []
    # The update has no communication: one rank can run it alone, and the others leave it the machine.
    with patch.object(trainee.engine, "publish", lambda *_: None):
        turns = (trainee.optimizer, prepared_ms), (stock, stock_ms)
        for optimizer, times in (*turns, *turns[::-1]) * (_WARM_UP_STEPS + repeats):
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


class Stopwatch:
    """Seconds by phase; a phase inside another stops the outer one's clock."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
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


def time_phases(trainees: tuple[Trainee, Trainee], steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """ms of each phase of a step, adapting and with a fixed placement, mean over ranks. Waiting for other ranks
    counts where it happens, so phases that communicate take up what made the ranks uneven before. A collective."""
    by_phase: dict[str, defaultdict[str, list[float]]] = {}
    for trainee, (role, adapts) in zip(trainees, (("adapting", True), ("fixed", False)), strict=True):
        trainee.adapt(every_step=True)
        trainee.step()
        trainee.adapt(every_step=adapts)
        trainee.step()
        trainee.settle()
        by_phase[role] = defaultdict(list)
    for _ in range(steps):
        for trainee, phases in zip(trainees, by_phase.values(), strict=True):
            dist.barrier()
            for name, seconds in _timed_step(trainee).items():
                phases[name].append(1e3 * seconds)
    world_size = dist.get_world_size()
    return {
        role: {name: spread(np.array(total(phases[name])) / world_size) for name in sorted(phases)}
        for role, phases in by_phase.items()
    }


def _timed_step(trainee: Trainee) -> dict[str, float]:
    """Seconds of each phase of one step on this rank; the weights' arrival is waited for at the end."""
    engine, watch = trainee.engine, Stopwatch()
    with ExitStack() as patches:
        for name in ("collect", "place", "distribute"):
            patches.enter_context(patch.object(engine, name, watch.timed(name, getattr(engine, name))))
        with watch.phase("forward"):
            loss = trainee.forward()
        with watch.phase("backward"):
            loss.backward()
        with watch.phase("clip"):
            engine.clip_grad_norm_(1.0)
        with watch.phase("update"):
            trainee.optimizer.step()
            trainee.optimizer.zero_grad()
        with watch.phase("arrive"):
            trainee.settle()
    return watch.seconds
