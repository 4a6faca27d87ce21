"""A policy, run on a trace: where experts would have been, and what that would have done.

S steps, L layers, E experts, W ranks, P hosted (rank, expert) pairs.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Final

import numpy as np

from swiftmoe_lightning.analysis.cost import busiest_phase
from swiftmoe_lightning.placement import (
    CAUSES,
    Capacity,
    Certificate,
    ExpertLoad,
    Forecast,
    PlacementPolicy,
    Placer,
    certify,
    imbalance,
    plan_dispatch,
)

# Certificates cost as much as the replay itself: this many steps, evenly spread over those with tokens, stand for all.
_CERTIFIED_STEPS: Final = 200


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy did on a trace.

    Attributes:
        replicas_SLE: [S, L, E] int32, slots of each expert.
        wanted_SLW: [S, L, W] int64, assignments that went to each rank.
        load_SLW: [S, L, W] int64, those of them that it computed.
        hosted_SL: [S, L] int64, P.
        moved_SL: [S, L] int64, pairs that were not hosted a step before.
        busiest_SL: [S, L] float, see `busiest_phase`.
        achieved: mean of what the certificates explain.
        losses: means of the certificates, by cause.
        bounds: means of the certificates, by cause.
        planning_seconds: mean time to place all layers and split their tokens, one step.
    """

    replicas_SLE: np.ndarray
    wanted_SLW: np.ndarray
    load_SLW: np.ndarray
    hosted_SL: np.ndarray
    moved_SL: np.ndarray
    busiest_SL: np.ndarray
    achieved: float
    losses: dict[str, float]
    bounds: dict[str, float]
    planning_seconds: float

    @property
    def dropped_SL(self) -> np.ndarray:
        """[S, L] assignments over capacity."""
        return self.wanted_SLW.sum(2) - self.load_SLW.sum(2)

    @property
    def imbalance_SL(self) -> np.ndarray:
        """[S, L] largest load of a rank over the mean load; 1 where nothing was computed."""
        return imbalance(self.load_SLW)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a policy is run.

    Attributes:
        split: token split.
        capacity: None is dropless.
        lag: a step is planned from the one this many rows before it; 1 is what training does. 0 is a clairvoyant's: the
            policy alone, told of the very step that it serves.
        interval: rows between two placements, or "auto". See `SwiftMoEConfig`.
    """

    split: str = "balanced"
    capacity: Capacity | None = None
    lag: int = 1
    interval: int | str = 1


def replay(popularity_SLE: np.ndarray, policy: PlacementPolicy, rules: Rules) -> Replay:
    """Run `policy` on a trace, by the placer and the token split of training.

    Args:
        popularity_SLE: [S, L, E] int64 assignments, not all 0.
        policy: a new one, where it remembers.
        rules: how it is run.
    """
    num_steps, num_layers, num_experts = popularity_SLE.shape
    run = _Run(policy, rules, num_layers, num_experts)
    certified = _spread(np.flatnonzero(popularity_SLE.any((1, 2))))
    certificates: list[Certificate] = []
    found = _Arrays(num_steps, num_layers, num_experts, policy.world_size)
    seconds = 0.0
    for step, popularity_LE in enumerate(popularity_SLE):
        begin = time.perf_counter()
        loads = run.step(popularity_LE)
        seconds += time.perf_counter() - begin
        found.keep(step, loads)
        if step in certified:
            certificates += [certify(load, rules.capacity) for load in loads if load.num_assignments]
    return Replay(
        found.replicas_SLE,
        found.wanted_SLW,
        found.load_SLW,
        found.hosted_SL,
        found.moved_SL,
        found.busiest_SL,
        float(np.mean([c.achieved for c in certificates])),
        {cause: float(np.mean([c.losses[cause] for c in certificates])) for cause in CAUSES},
        {cause: float(np.mean([c.bounds[cause] for c in certificates])) for cause in CAUSES},
        seconds / num_steps,
    )


def _spread(steps: np.ndarray) -> set[int]:
    """At most `_CERTIFIED_STEPS` of these steps, the first and the last among them."""
    places = np.linspace(0, len(steps) - 1, min(len(steps), _CERTIFIED_STEPS)).round().astype(int)
    return set(steps[places].tolist())


class _Run:
    """Steps as training has them: run with a placement, be told of the step, place for a later one."""

    def __init__(self, policy: PlacementPolicy, rules: Rules, num_layers: int, num_experts: int) -> None:
        self._policy, self._rules = policy, rules
        self._names = [str(layer) for layer in range(num_layers)]
        self._placer = Placer(lambda _: policy, skip_when_balanced=rules.interval == "auto")
        self._placements = list(self._placer.planned(dict.fromkeys(self._names, num_experts)).values())
        self._unseen: deque[list[ExpertLoad]] = deque()
        # By layer: what it saw since it was placed.
        self._since: list[list[ExpertLoad]] = [[] for _ in self._names]

    def step(self, popularity_LE: np.ndarray) -> list[ExpertLoad]:
        """One row of the trace -> each layer's load, and where its experts were."""
        if self._rules.lag == 0:
            self._placements = list(self._policy.place(Forecast.of(popularity_LE, spread=0.0)))
        elif len(self._unseen) == self._rules.lag:
            self._see(self._unseen.popleft())
        loads = []
        for popularity_E, placement in zip(popularity_LE, self._placements, strict=True):
            # Who sends what does not matter to loads, so one source will do.
            counts_1E = popularity_E[None]
            plan = plan_dispatch(counts_1E, placement, self._rules.split, self._rules.capacity)
            loads.append(ExpertLoad.of(counts_1E, plan, placement))
        if self._rules.lag:
            self._unseen.append(loads)
        return loads

    def _see(self, loads: list[ExpertLoad]) -> None:
        interval = self._rules.interval if isinstance(self._rules.interval, int) else 1
        seen = {}
        for layer, load in enumerate(loads):
            since = self._since[layer]
            # As in training, a layer that a step did not use has nothing to go by, and does not count the step.
            if load.num_assignments:
                since.append(load)
            is_due = len(since) == interval
            seen[self._names[layer]] = reduce(add, since) if is_due else ExpertLoad.zero(self._placements[layer])
            if is_due:
                since.clear()
        # All layers or none: some policies remember them as one table.
        if any(load.num_assignments for load in seen.values()):
            found = self._placer.next_placements(seen)
            self._placements = [
                # With a lag, to stay is not to go back to where it was when that step ran.
                now if self._rules.interval == "auto" and found[name] is seen[name].placement else found[name]
                for name, now in zip(self._names, self._placements, strict=True)
            ]


class _Arrays:
    """The arrays of a `Replay`, filled step by step."""

    def __init__(self, num_steps: int, num_layers: int, num_experts: int, world_size: int) -> None:
        self.replicas_SLE = np.zeros((num_steps, num_layers, num_experts), dtype=np.int32)
        self.wanted_SLW = np.zeros((num_steps, num_layers, world_size), dtype=np.int64)
        self.load_SLW = np.zeros_like(self.wanted_SLW)
        self.hosted_SL, self.moved_SL = np.zeros((2, num_steps, num_layers), dtype=np.int64)
        self.busiest_SL = np.zeros((num_steps, num_layers))
        self._before: list[ExpertLoad] = []

    def keep(self, step: int, loads: list[ExpertLoad]) -> None:
        for layer, load in enumerate(loads):
            placement = load.placement
            self.replicas_SLE[step, layer] = placement.replica_counts_E
            self.wanted_SLW[step, layer], self.load_SLW[step, layer] = load.wanted_W, load.load_W
            self.hosted_SL[step, layer] = len(placement.pair_host_P)
            self.busiest_SL[step, layer] = busiest_phase(placement)
            if self._before:
                self.moved_SL[step, layer] = self._before[layer].placement.num_moved(placement)
        self._before = loads
