"""A policy, run on a trace: where experts would have been, and what that would have done.

S steps, L layers, E experts, W ranks, D hosted (rank, expert) pairs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from swiftmoe_lightning.placement import (
    CAUSES,
    Capacity,
    Certificate,
    DispatchPlan,
    Observation,
    Placement,
    PlacementPolicy,
    Placer,
    certify_drops,
    certify_imbalance,
    plan_dispatch,
)
from swiftmoe_lightning.planner.cost import busiest_phase

# Certificates cost as much as the replay itself: this many steps, evenly spread over those with tokens, stand for all.
_CERTIFIED_STEPS: Final = 200


@dataclass(frozen=True, eq=False)
class Replay:
    """What a policy did on a trace.

    replicas_SLE: slots of each expert. wanted_SLW, load_SLW: token-choices that went to each rank, and that it
    computed. hosted_SL: D. moved_SL: pairs that were not hosted a step before. busiest_SL: see `busiest_phase`.
    losses, bounds: means of the certificates, by cause. achieved: of what they explain.
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
        """[S, L] token-choices over capacity."""
        return self.wanted_SLW.sum(2) - self.load_SLW.sum(2)

    @property
    def imbalance_SL(self) -> np.ndarray:
        """[S, L] largest load of a rank over the mean load; 1 where nothing was computed."""
        return rank_imbalance(self.load_SLW)


def rank_imbalance(load_SLW: np.ndarray) -> np.ndarray:
    """[S, L]: load of the busiest rank over the mean; 1 where nothing was computed."""
    mean_SL = load_SLW.mean(2)
    return np.where(mean_SL > 0, load_SLW.max(2) / np.where(mean_SL > 0, mean_SL, 1), 1.0)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a policy is run.

    split: token split. capacity: None is dropless.
    lag: a step is planned from the one this many rows before it; 1 is what training does. 0 is a clairvoyant's: the
        policy alone, told of the very step that it serves.
    interval: rows between two placements, or "auto"; decay: of the moving average. See `SwiftMoEConfig`.
    """

    split: str = "flow"
    capacity: Capacity | None = None
    lag: int = 1
    interval: int | str = 1
    decay: float = 0.0


def replay(popularity_SLE: np.ndarray, policy: PlacementPolicy, rules: Rules) -> Replay:
    """Run `policy` on a trace, by the placer and the token split of training.

    popularity_SLE: [S, L, E] int64 token-choices, not all 0.
    """
    num_steps, num_layers, num_experts = popularity_SLE.shape
    run = _Run(policy, rules, num_layers, num_experts)
    certified = _spread(np.flatnonzero(popularity_SLE.any((1, 2))))
    certificates: list[Certificate] = []
    found = _Arrays(num_steps, num_layers, num_experts, policy.world_size)
    seconds = 0.0
    for step, popularity_LE in enumerate(popularity_SLE):
        begin = time.perf_counter()
        placements, plans = run.step(popularity_LE)
        seconds += time.perf_counter() - begin
        found.keep(step, placements, plans)
        if step in certified:
            layers = zip(popularity_LE, placements, plans, strict=True)
            certificates += [_certify(*layer, rules.capacity) for layer in layers if layer[0].any()]
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
        self._placer = Placer(policy, num_experts, decay=rules.decay, keeps_even=rules.interval == "auto")
        self._placements: Sequence[Placement] = self._placer.placements_of(self._names)
        self._unseen: deque[list[Observation]] = deque()
        # By layer: what it saw since it was placed.
        self._since: list[list[Observation]] = [[] for _ in self._names]

    def step(self, popularity_LE: np.ndarray) -> tuple[Sequence[Placement], list[DispatchPlan]]:
        """One row of the trace -> where its experts were, and what every layer's ranks got."""
        if self._rules.lag == 0:
            self._placements = self._policy.next_placements(popularity_LE)
        elif len(self._unseen) == self._rules.lag:
            self._see(self._unseen.popleft())
        # Who sends what does not matter to loads, so one source will do.
        plans = [
            plan_dispatch(popularity_E[None], placement, self._rules.split, self._rules.capacity)
            for popularity_E, placement in zip(popularity_LE, self._placements, strict=True)
        ]
        if self._rules.lag:
            layers = zip(self._placements, popularity_LE, plans, strict=True)
            self._unseen.append([Observation(p, popularity_E, plan.wanted_W) for p, popularity_E, plan in layers])
        return self._placements, plans

    def _see(self, observed: list[Observation]) -> None:
        interval = self._rules.interval if isinstance(self._rules.interval, int) else 1
        seen = {}
        for layer, observation in enumerate(observed):
            since = self._since[layer]
            # As in training, a layer that a step did not use has nothing to go by, and does not count the step.
            if observation.popularity_E.any():
                since.append(observation)
            is_due = len(since) == interval
            seen[self._names[layer]] = _summed(since if is_due else [], self._placements[layer])
            if is_due:
                since.clear()
        # All layers or none: some policies remember them as one table.
        if any(observation.popularity_E.any() for observation in seen.values()):
            found = self._placer.next_placements(seen)
            self._placements = [
                # With a lag, to stay is not to go back to where it was when that step ran.
                now if self._rules.interval == "auto" and found[name] is seen[name].placement else found[name]
                for name, now in zip(self._names, self._placements, strict=True)
            ]


def _summed(steps: Sequence[Observation], placement: Placement) -> Observation:
    """These steps as one; of no steps, one without tokens."""
    popularity_E = np.zeros(placement.num_experts, dtype=np.int64)
    wanted_W = np.zeros(placement.world_size, dtype=np.int64)
    for step in steps:
        popularity_E, wanted_W = popularity_E + step.popularity_E, wanted_W + step.wanted_W
    return Observation(steps[-1].placement if steps else placement, popularity_E, wanted_W)


def _certify(
    popularity_E: np.ndarray, placement: Placement, plan: DispatchPlan, capacity: Capacity | None
) -> Certificate:
    if capacity is None:
        return certify_imbalance(popularity_E, placement, plan.wanted_W)
    return certify_drops(popularity_E, placement, plan.num_dropped_tokens, plan.budget, capacity.per)


class _Arrays:
    """The arrays of a `Replay`, filled step by step."""

    def __init__(self, num_steps: int, num_layers: int, num_experts: int, world_size: int) -> None:
        self.replicas_SLE = np.zeros((num_steps, num_layers, num_experts), dtype=np.int32)
        self.wanted_SLW = np.zeros((num_steps, num_layers, world_size), dtype=np.int64)
        self.load_SLW = np.zeros_like(self.wanted_SLW)
        self.hosted_SL, self.moved_SL = np.zeros((2, num_steps, num_layers), dtype=np.int64)
        self.busiest_SL = np.zeros((num_steps, num_layers))
        self._before: Sequence[Placement] = ()

    def keep(self, step: int, placements: Sequence[Placement], plans: list[DispatchPlan]) -> None:
        for layer, (placement, plan) in enumerate(zip(placements, plans, strict=True)):
            self.replicas_SLE[step, layer] = placement.replica_counts_E
            self.wanted_SLW[step, layer], self.load_SLW[step, layer] = plan.wanted_W, plan.load_W
            self.hosted_SL[step, layer] = len(placement.pair_host_D)
            self.busiest_SL[step, layer] = busiest_phase(placement)
            if self._before:
                self.moved_SL[step, layer] = self._before[layer].num_moved(placement)
        self._before = placements
