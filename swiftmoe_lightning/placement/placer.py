"""The placements of a run's layers, step after step: forecast, policy, uniform fallback.

L layers, E experts, W ranks, s slots of a rank, S = W * s slots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np

from swiftmoe_lightning.placement.forecast import Forecast, Forecaster
from swiftmoe_lightning.placement.load import ExpertLoad
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy, check_placements
from swiftmoe_lightning.placement.shares import balanced_shares, rank_loads

# The gain of plans over uniform replicas is averaged over some ten placements. Averages over fewer are noise: on
# traces, with a half-life of one placement, layers switched up to 200 times and dropped more than without a fallback.
_GAIN_FADE: Final = 0.9
# Uniform replicas take over at a mean gain below minus this, the policy at one above this; in shares of assignments.
_FALLBACK_MARGIN: Final = 0.01
# Loads are even when the largest is at most this many times the mean.
_EVEN: Final = 1.02


class Placer:
    """Places the layers of a run by a policy, with three additions that remember earlier steps.

    forecast   the popularity of the last step is the forecast of the next, with an estimate of how far it may be off
    fallback   for policies that have the uniform fallback: where their loads were, on average, less even than those of
               uniform replicas would have been, the layer has uniform replicas until the policy would do better again
    cadence    with `skip_when_balanced`, a placement stays while its loads are even, unless the next has fewer pairs

    Deterministic: from equal loads every rank computes equal placements.

    Args:
        make_policy: E -> the rule for layers of E experts; called once for each E.
        skip_when_balanced: see "cadence" above.
        report: called with one line whenever a layer falls back to uniform replicas, or returns from them.

    Attributes:
        layers: layer name -> what is remembered of it.
    """

    def __init__(
        self,
        make_policy: Callable[[int], PlacementPolicy],
        *,
        skip_when_balanced: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self._policy_of = policy_of = cache(make_policy)
        self._uniform_of = cache(lambda num_experts: _uniform(num_experts, policy_of(num_experts)))
        self._skip_when_balanced, self._report = skip_when_balanced, report
        self.layers: dict[str, LayerMemory] = {}

    def planned(self, num_experts: Mapping[str, int]) -> dict[str, Placement]:
        """Layer name -> its placement by the steps so far; for a layer without any, that of a uniform popularity.

        Args:
            num_experts: layer name -> its E.

        Raises:
            ValueError: when the policy's placements do not fit.
        """
        for name, number in num_experts.items():
            if name not in self.layers:
                self.layers[name] = LayerMemory(Forecaster(number))
        plans = self._plans(num_experts)
        suspended = {name for name in plans if self.layers[name].suspended_plan is not None}
        return {name: self._uniform_of(plan.num_experts) if name in suspended else plan for name, plan in plans.items()}

    def next_placements(self, loads: Mapping[str, ExpertLoad]) -> dict[str, Placement]:
        """Layer name -> its placement for the next step. A layer without assignments keeps its placement.

        Args:
            loads: layer name -> its load since it was placed last. Layers must have been `planned` before.

        Raises:
            ValueError: when the policy's placements do not fit.
        """
        for name, load in loads.items():
            self.layers[name].forecaster.update(load.popularity_E)
        placements = self._plans(loads)
        for name, load in loads.items():
            if not load.num_assignments:
                placements[name] = load.placement
                continue
            if self._skip_when_balanced and _may_stay(load, placements[name]):
                placements[name] = load.placement
            if self._policy_of(load.placement.num_experts).has_uniform_fallback:
                placements[name] = self._with_fallback(name, load, placements[name])
        return placements

    def observe(self, name: str, popularity_E: np.ndarray) -> None:
        """Take in the popularity of a step that this placer did not place.

        Args:
            name: the layer's; it must have been `planned` before.
            popularity_E: [E] assignments.
        """
        self.layers[name].forecaster.update(popularity_E)

    def state_dict(self, name: str) -> dict[str, np.ndarray]:
        """What is remembered of a layer, to be saved."""
        memory = self.layers[name]
        fallback = np.array([memory.gain, memory.suspended_plan is not None])
        return {**memory.forecaster.state_dict(), "fallback": fallback}

    def load_state_dict(self, name: str, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was saved, maybe at another number of ranks.

        Args:
            name: the layer's; it must have been `planned` before.
            state: what `state_dict` gave.
        """
        memory = self.layers[name]
        memory.forecaster.load_state_dict(state)
        memory.gain, falls_back = map(float, state["fallback"])
        memory.suspended_plan = self._plans([name])[name] if falls_back else None

    def _plans(self, names: Iterable[str]) -> dict[str, Placement]:
        """The policies' placements, in the order of the names; layers with equally many experts are placed together."""
        by_size: dict[int, list[str]] = defaultdict(list)
        for name in names:
            by_size[len(self.layers[name].forecaster.expected_E)].append(name)
        plans: dict[str, Placement] = {}
        for num_experts, same_size_names in by_size.items():
            policy, forecasters = (
                self._policy_of(num_experts),
                [self.layers[name].forecaster for name in same_size_names],
            )
            spread_L = np.array([forecaster.spread(policy.world_size) for forecaster in forecasters])
            placements = policy.place(Forecast(np.stack([f.expected_E for f in forecasters]), spread_L))
            check_placements(policy, placements, len(same_size_names), num_experts)
            plans |= zip(same_size_names, placements, strict=True)
        return {name: plans[name] for name in names}

    def _with_fallback(self, name: str, load: ExpertLoad, planned: Placement) -> Placement:
        """`planned`, or uniform replicas where those have been more even. `load` is since the last placement."""
        memory, uniform = self.layers[name], self._uniform_of(planned.num_experts)
        if memory.suspended_plan is None:
            wanted_W = load.wanted_W
        else:
            # What the loads would have been under the plan that uniform replicas replaced.
            wanted_W = memory.suspended_plan.sum_by_rank(balanced_shares(load.popularity_E, memory.suspended_plan))
        gain = excess(rank_loads(load.popularity_E, uniform.table_Ws)) - excess(wanted_W)
        memory.gain = _GAIN_FADE * memory.gain + (1 - _GAIN_FADE) * gain
        fell_back = memory.suspended_plan is not None
        falls_back = memory.gain < (_FALLBACK_MARGIN if fell_back else -_FALLBACK_MARGIN)
        memory.suspended_plan = planned if falls_back else None
        memory.num_placements += 1
        memory.num_fallbacks += falls_back
        if self._report is not None and falls_back != fell_back:
            self._report(
                f"{name}: popularity moves so fast that placements by it did worse than uniform replicas; uniform "
                "replicas take over until that changes."
                if falls_back
                else f"{name}: placements by popularity take over again."
            )
        return uniform if falls_back else planned


@dataclass(eq=False)
class LayerMemory:
    """What a `Placer` remembers of a layer.

    Attributes:
        forecaster: of its next popularity.
        gain: how much more even the policy's placements were than uniform ones, in shares of all assignments: an
            exponential moving average, which begins at 0.
        suspended_plan: the policy's last placement while uniform replicas replace it; else None.
        num_placements: placements by a policy that has the uniform fallback.
        num_fallbacks: those of them that uniform replicas replaced.
    """

    forecaster: Forecaster
    gain: float = 0.0
    suspended_plan: Placement | None = None
    num_placements: int = 0
    num_fallbacks: int = 0


def _uniform(num_experts: int, policy: PlacementPolicy) -> Placement:
    return Placement.uniform(num_experts, policy.world_size, policy.slots_per_rank)


def _may_stay(load: ExpertLoad, planned: Placement) -> bool:
    is_even = load.wanted_W.max() <= _EVEN * load.wanted_W.mean()
    return bool(is_even) and load.placement.num_pairs <= planned.num_pairs


def excess(load_W: np.ndarray) -> float:
    """Share of all assignments that lies above the mean load of a rank: what a capacity factor of 1 would drop.

    Args:
        load_W: [W] assignments of each rank.
    """
    total = load_W.sum()
    return float(np.maximum(load_W - total / len(load_W), 0).sum() / total) if total else 0.0
