"""The placements of a run's layers, step after step: what is expected, where it goes, whether it is worth it.

L layers, E experts, W ranks, s slots of a rank, S = W * s slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from swiftmoe_lightning.placement.forecast import Forecast, Forecaster
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policy import PlacementPolicy, check_placements
from swiftmoe_lightning.placement.shares import flow_shares, rank_loads
from swiftmoe_lightning.placement.token_split import sum_by_host

# The guard's memory: what plans gained over uniform replicas is averaged over some ten placements. A shorter one tells
# noise: on traces, a half-life of one placement switched up to 200 times, and dropped more than no guard at all.
_GUARD_FADE: Final = 0.9
# It steps in for a mean loss of so much, in shares of all choices, and out again for as much of a gain.
_GUARD_MARGIN: Final = 0.01
# Loads whose largest is this near to the mean leave nothing to gain.
_EVEN: Final = 1.02


@dataclass(frozen=True, eq=False)
class Observation:
    """What a layer did since it was placed last.

    placement: where its experts were. popularity_E: [E] int64 token-choices.
    wanted_W: [W] int64 token-choices that went to each rank, before any cut at capacity.
    """

    placement: Placement
    popularity_E: np.ndarray
    wanted_W: np.ndarray


class Placer:
    """Places layers of one number of experts by a policy, with three additions that need a memory.

    forecast   what the next step will bring: the last step, or a moving average (`decay`), and how far that may be off
    guard      where a guarded policy's loads were, on balance, less even than uniform replicas' would have been,
               the layer has uniform replicas until the policy would do better again
    cadence    with `keeps_even`, a placement stays while its loads are even and a new one would not need fewer hosts

    Deterministic: every rank that is told the same finds the same placements.

    policy: the rule. num_experts: E. report: called with one line whenever the guard steps in or out.
    """

    def __init__(
        self,
        policy: PlacementPolicy,
        num_experts: int,
        *,
        decay: float = 0.0,
        keeps_even: bool = False,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.policy, self.num_experts = policy, num_experts
        self._decay, self._keeps_even, self._report = decay, keeps_even, report
        self._layers: dict[str, _LayerMemory] = {}

    def placements_of(self, names: Sequence[str]) -> list[Placement]:
        """Where these layers' experts go by what is known so far; before their first step that is nothing."""
        memories = [self._memory(name) for name in names]
        planned = self._planned(memories)
        return [self._uniform if m.overruled else placement for m, placement in zip(memories, planned, strict=True)]

    def next_placements(self, observed: Mapping[str, Observation]) -> dict[str, Placement]:
        """Layer name -> its placement for the next step. A layer that saw no token-choice stays as it is.

        Raises ValueError when the policy's placements do not fit.
        """
        memories = [self._memory(name) for name in observed]
        for memory, observation in zip(memories, observed.values(), strict=True):
            memory.forecaster.update(observation.popularity_E)
        found = {}
        planned = self._planned(memories)
        for (name, observation), memory, chosen in zip(observed.items(), memories, planned, strict=True):
            if not observation.popularity_E.any():
                found[name] = observation.placement
                continue
            if self._keeps_even and self._may_stay(observation, chosen):
                chosen = observation.placement
            if self.policy.is_guarded:
                chosen = self._guarded(name, memory, observation, chosen)
            found[name] = chosen
        return found

    def expect(self, name: str, popularity_E: np.ndarray) -> None:
        """Say what a layer got in a step that no placement of ours served: [E] token-choices."""
        self._memory(name).forecaster.update(popularity_E)

    def guard_counts(self) -> dict[str, tuple[int, int]]:
        """Layer name -> (how often uniform replicas stood in for the policy's plan, out of how many placements), for
        the layers where they ever did."""
        return {name: (m.num_overruled, m.num_guarded) for name, m in self._layers.items() if m.num_overruled}

    def state_dict(self, name: str) -> dict[str, np.ndarray]:
        """What is remembered of a layer, to be saved."""
        memory = self._memory(name)
        guard = np.array([memory.gain, memory.overruled is not None])
        return {**memory.forecaster.state_dict(), "guard": guard}

    def load_state_dict(self, name: str, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was saved, maybe at another number of ranks."""
        memory = self._memory(name)
        memory.forecaster.load_state_dict(state)
        memory.gain, is_overruled = map(float, state["guard"])
        memory.overruled = self._planned([memory])[0] if is_overruled else None

    @cached_property
    def _uniform(self) -> Placement:
        return Placement.uniform(self.num_experts, self.policy.world_size, self.policy.slots_per_rank)

    def _memory(self, name: str) -> _LayerMemory:
        return self._layers.setdefault(name, _LayerMemory(Forecaster(self.num_experts, self._decay)))

    def _planned(self, memories: Sequence[_LayerMemory]) -> Sequence[Placement]:
        expected_LE = np.stack([memory.forecaster.expected_E for memory in memories])
        spread_L = np.array([memory.forecaster.spread(self.policy.world_size) for memory in memories])
        placements = self.policy.place(Forecast(expected_LE, spread_L))
        check_placements(self.policy, placements, len(memories), self.num_experts)
        return placements

    @staticmethod
    def _may_stay(observation: Observation, planned: Placement) -> bool:
        is_even = observation.wanted_W.max() <= _EVEN * observation.wanted_W.mean()
        return bool(is_even) and len(observation.placement.pair_host_D) <= len(planned.pair_host_D)

    def _guarded(self, name: str, memory: _LayerMemory, observation: Observation, planned: Placement) -> Placement:
        if memory.overruled is None:
            wanted_W = observation.wanted_W
        else:
            # What the plan that was not followed would have done.
            wanted_W = sum_by_host(flow_shares(observation.popularity_E, memory.overruled), memory.overruled)
        gain = excess(rank_loads(observation.popularity_E, self._uniform.table_Ws)) - excess(wanted_W)
        memory.gain = _GUARD_FADE * memory.gain + (1 - _GUARD_FADE) * gain
        was_overruled = memory.overruled is not None
        is_overruled = memory.gain < (_GUARD_MARGIN if was_overruled else -_GUARD_MARGIN)
        memory.overruled = planned if is_overruled else None
        memory.num_guarded += 1
        memory.num_overruled += is_overruled
        if self._report is not None and is_overruled != was_overruled:
            self._report(
                f"{name}: popularity moves so fast that placements by it did worse than uniform replicas; uniform "
                "replicas take over until that changes."
                if is_overruled
                else f"{name}: placements by popularity take over again."
            )
        return self._uniform if is_overruled else planned


@dataclass(eq=False)
class _LayerMemory:
    """gain: by how much placements were more even than uniform ones, in shares of all choices; a fading mean, which
    begins at 0. overruled: the plan that uniform replicas stand in for, if they do.
    num_guarded, num_overruled: placements of a guarded policy here, and those of them that uniform replicas stood in
    for."""

    forecaster: Forecaster
    gain: float = 0.0
    overruled: Placement | None = None
    num_guarded: int = 0
    num_overruled: int = 0


def excess(load_W: np.ndarray) -> float:
    """Share of all choices that lies above the mean load of a rank: what a capacity factor of 1 would drop."""
    total = load_W.sum()
    return float(np.maximum(load_W - total / len(load_W), 0).sum() / total) if total else 0.0
