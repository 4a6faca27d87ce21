"""A policy run on a trace: the placements that it would have made, and the loads of the ranks.

U steps, L layers, E experts, W ranks, P (rank, expert) pairs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Final

import numpy as np

from swiftmoe_lightning.analysis.cost import busiest_phase
from swiftmoe_lightning.placement import (
    CAUSES,
    Bounds,
    Capacity,
    ExpertLoad,
    Forecast,
    PlacementPolicy,
    Placer,
    find_bounds,
    imbalance,
    plan_dispatch,
)

# Bounds cost as much as the replay itself: this many steps, evenly spread over those with tokens, stand for all.
_BOUNDED_STEPS: Final = 200


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy did on a trace.

    Attributes:
        replicas_ULE: [U, L, E] int32, slots of each expert.
        wanted_ULW: [U, L, W] int64, assignments that went to each rank.
        load_ULW: [U, L, W] int64, those of them that it computed.
        num_pairs_UL: [U, L] int64, P.
        moved_UL: [U, L] int64, pairs that were not there a step before.
        busiest_UL: [U, L] float, see `busiest_phase`.
        achieved: mean of `Bounds.achieved`.
        losses: cause -> mean of `Bounds.losses`.
        bounds: cause -> mean of `Bounds.by_cause`.
        planning_seconds: mean time to place all layers and split their tokens, one step.
    """

    replicas_ULE: np.ndarray
    wanted_ULW: np.ndarray
    load_ULW: np.ndarray
    num_pairs_UL: np.ndarray
    moved_UL: np.ndarray
    busiest_UL: np.ndarray
    achieved: float
    losses: dict[str, float]
    bounds: dict[str, float]
    planning_seconds: float

    @property
    def dropped_UL(self) -> np.ndarray:
        """[U, L] assignments over capacity."""
        return self.wanted_ULW.sum(2) - self.load_ULW.sum(2)

    @property
    def imbalance_UL(self) -> np.ndarray:
        """[U, L] largest load of a rank over the mean load; 1 where nothing was computed."""
        return imbalance(self.load_ULW)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a policy is run.

    Attributes:
        split: token split.
        capacity: None is dropless.
        lag: a step is planned from the one this many rows before it; 1 is what training does. 0 is an oracle's: the
            policy alone, told of the very step that it serves.
        interval: rows between two placements, or "auto". See `SwiftMoEConfig`.
    """

    split: str = "balanced"
    capacity: Capacity | None = None
    lag: int = 1
    interval: int | str = 1


def replay(popularity_ULE: np.ndarray, policy: PlacementPolicy, rules: Rules) -> Replay:
    """Run `policy` on a trace, by the placer and the token split of training.

    Args:
        popularity_ULE: [U, L, E] int64 assignments, not all 0.
        policy: a new one, where it remembers.
        rules: how it is run.
    """
    num_steps, num_layers, num_experts = popularity_ULE.shape
    steps = replayed_loads(popularity_ULE, policy, rules)
    bounded_steps = _spread(np.flatnonzero(popularity_ULE.any((1, 2))))
    bounds: list[Bounds] = []
    arrays = _Arrays(num_steps, num_layers, num_experts, policy.world_size)
    seconds = 0.0
    for step in range(num_steps):
        begin = time.perf_counter()
        loads = next(steps)
        seconds += time.perf_counter() - begin
        arrays.keep(step, loads)
        if step in bounded_steps:
            bounds += [find_bounds(load, rules.capacity) for load in loads if load.num_assignments]
    return Replay(
        arrays.replicas_ULE,
        arrays.wanted_ULW,
        arrays.load_ULW,
        arrays.num_pairs_UL,
        arrays.moved_UL,
        arrays.busiest_UL,
        float(np.mean([b.achieved for b in bounds])),
        {cause: float(np.mean([b.losses[cause] for b in bounds])) for cause in CAUSES},
        {cause: float(np.mean([b.by_cause[cause] for b in bounds])) for cause in CAUSES},
        seconds / num_steps,
    )


def replayed_loads(popularity_ULE: np.ndarray, policy: PlacementPolicy, rules: Rules) -> Iterator[list[ExpertLoad]]:
    """What `replay` adds up: each step's loads by layer, one step after the other.

    Args:
        popularity_ULE: as in `replay`.
        policy: a new one, where it remembers.
        rules: how it is run.
    """
    _, num_layers, num_experts = popularity_ULE.shape
    run = _Run(policy, rules, num_layers, num_experts)
    for popularity_LE in popularity_ULE:
        yield run.step(popularity_LE)


def _spread(steps: np.ndarray) -> set[int]:
    """At most `_BOUNDED_STEPS` of these steps, the first and the last among them."""
    rows = np.linspace(0, len(steps) - 1, min(len(steps), _BOUNDED_STEPS)).round().astype(int)
    return set(steps[rows].tolist())


class _Run:
    """The steps of a training run, one by one: split the tokens by the placement, then place for a later step."""

    def __init__(self, policy: PlacementPolicy, rules: Rules, num_layers: int, num_experts: int) -> None:
        self._policy, self._rules = policy, rules
        self._names = [str(layer) for layer in range(num_layers)]
        self._placer = Placer(lambda _: policy, skip_when_balanced=rules.interval == "auto")
        self._placements = list(self._placer.planned(dict.fromkeys(self._names, num_experts)).values())
        self._unseen: deque[list[ExpertLoad]] = deque()
        # By layer: the loads since its last placement.
        self._since: list[list[ExpertLoad]] = [[] for _ in self._names]

    def step(self, popularity_LE: np.ndarray) -> list[ExpertLoad]:
        """One row of the trace -> each layer's load, and where its experts were."""
        if self._rules.lag == 0:
            self._placements = list(self._policy.place(Forecast.of(popularity_LE, spread=0.0)))
        elif len(self._unseen) == self._rules.lag:
            self._place_after(self._unseen.popleft())
        loads = []
        for popularity_E, placement in zip(popularity_LE, self._placements, strict=True):
            # Loads do not depend on the source ranks, so one source has all assignments.
            counts_1E = popularity_E[None]
            plan = plan_dispatch(counts_1E, placement, self._rules.split, self._rules.capacity)
            loads.append(ExpertLoad.of(counts_1E, plan, placement))
        if self._rules.lag:
            self._unseen.append(loads)
        return loads

    def _place_after(self, loads: list[ExpertLoad]) -> None:
        interval = self._rules.interval if isinstance(self._rules.interval, int) else 1
        load_by_name = {}
        for layer, load in enumerate(loads):
            since = self._since[layer]
            # As in training, a step that did not use the layer does not count towards the interval.
            if load.num_assignments:
                since.append(load)
            is_due = len(since) == interval
            load_by_name[self._names[layer]] = (
                reduce(add, since) if is_due else ExpertLoad.zero(self._placements[layer])
            )
            if is_due:
                since.clear()
        # All layers at once, since some policies keep one table of them all.
        if any(load.num_assignments for load in load_by_name.values()):
            placements = self._placer.next_placements(load_by_name)
            self._placements = [
                # A layer that is left alone keeps its current placement, which with a lag is not that of its load.
                current
                if self._rules.interval == "auto" and placements[name] is load_by_name[name].placement
                else placements[name]
                for name, current in zip(self._names, self._placements, strict=True)
            ]


class _Arrays:
    """The arrays of a `Replay`, filled step by step."""

    def __init__(self, num_steps: int, num_layers: int, num_experts: int, world_size: int) -> None:
        self.replicas_ULE = np.zeros((num_steps, num_layers, num_experts), dtype=np.int32)
        self.wanted_ULW = np.zeros((num_steps, num_layers, world_size), dtype=np.int64)
        self.load_ULW = np.zeros_like(self.wanted_ULW)
        self.num_pairs_UL, self.moved_UL = np.zeros((2, num_steps, num_layers), dtype=np.int64)
        self.busiest_UL = np.zeros((num_steps, num_layers))
        self._before: list[ExpertLoad] = []

    def keep(self, step: int, loads: list[ExpertLoad]) -> None:
        for layer, load in enumerate(loads):
            placement = load.placement
            self.replicas_ULE[step, layer] = placement.replica_counts_E
            self.wanted_ULW[step, layer], self.load_ULW[step, layer] = load.wanted_W, load.load_W
            self.num_pairs_UL[step, layer] = placement.num_pairs
            self.busiest_UL[step, layer] = busiest_phase(placement)
            if self._before:
                self.moved_UL[step, layer] = self._before[layer].placement.num_moved(placement)
        self._before = loads
