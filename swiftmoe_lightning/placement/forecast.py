"""Predicts a layer's next popularity, and its spread, from the steps so far. L layers, E experts, W ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

# var(load) / load, in mean loads of a rank, before any step was seen.
DEFAULT_SPREAD: Final = 0.2
# Policies plan for loads of this many standard deviations above the expected ones.
_DEVIATIONS: Final = 3.0
# In the estimate of the spread, older steps are multiplied by this at each step; DEFAULT_SPREAD counts at first as this
# many steps.
_FADE: Final = 0.9
_GUESS_STEPS: Final = 5.0


@dataclass(frozen=True, eq=False)
class Forecast:
    """What is expected of the next step in L layers.

    Attributes:
        popularity_LE: [L, E] float, expected assignments.
        spread_L: [L] float, var(load) / load about them, in mean loads of a rank.
    """

    popularity_LE: np.ndarray
    spread_L: np.ndarray

    @classmethod
    def of(cls, popularity_LE: np.ndarray, spread: float = DEFAULT_SPREAD) -> Forecast:
        """A forecast of these loads, with one spread for all layers.

        Args:
            popularity_LE: [L, E] assignments.
            spread: var(load) / load, in mean loads of a rank.
        """
        return cls(popularity_LE, np.full(len(popularity_LE), spread))

    def loads(self, world_size: int, cold: float) -> tuple[np.ndarray, np.ndarray]:
        """Expected loads and their upper limits, in mean loads of a rank.

        A layer without assignments counts as uniform.

        Args:
            world_size: W.
            cold: added to each load in the upper limit, in mean loads of a rank: an expert without tokens may become
                hot.

        Returns:
            ([L, E] expected loads, [L, E] upper limits), float. Rows of the first add up to W. The second is
            load + 3 * sqrt(spread * (load + cold)): three standard deviations more.
        """
        popularity_LE = np.asarray(self.popularity_LE, dtype=np.float64)
        popularity_LE = np.where(popularity_LE.sum(1, keepdims=True) == 0, 1.0, popularity_LE)
        load_LE = popularity_LE * (world_size / popularity_LE.sum(1, keepdims=True))
        return load_LE, load_LE + _DEVIATIONS * np.sqrt(self.spread_L[:, None] * (load_LE + cold))


class Forecaster:
    """Predicts for each expert its assignments of the last step, and estimates how far such predictions are off.

    On recorded traces the last step alone predicted as well as any moving average, or better.

    Args:
        num_experts: E.

    Attributes:
        expected_E: [E] float, assignments of the next step; all 0 before the first one.
    """

    def __init__(self, num_experts: int) -> None:
        self.expected_E = np.zeros(num_experts)
        # Sum of squared errors over loads, its weight, and the weight of DEFAULT_SPREAD: all fade alike.
        self._error, self._weight, self._guess = 0.0, 0.0, _GUESS_STEPS

    def update(self, popularity_E: np.ndarray) -> None:
        """Take in a step's popularity, [E] assignments. A step without any changes nothing."""
        total = popularity_E.sum()
        if total == 0:
            return
        before = self.expected_E.sum()
        if before == 0:
            self.expected_E = popularity_E.astype(np.float64)
            return
        # Batch sizes may change from step to step: only the shares are compared.
        expected_E = self.expected_E * (total / before)
        # The half: both steps deviate from the mean popularity, so their difference has twice the variance of one.
        error = ((popularity_E - expected_E) ** 2).sum() / (2 * float(total) ** 2)
        self._error, self._weight = _FADE * self._error + error, _FADE * self._weight + 1
        self._guess *= _FADE
        self.expected_E = popularity_E.astype(np.float64)

    def spread(self, world_size: int) -> float:
        """var(load) / load in mean loads of one of `world_size` ranks, about the expected loads."""
        return (self._guess * DEFAULT_SPREAD + world_size * self._error) / (self._guess + self._weight)

    def state_dict(self) -> dict[str, np.ndarray]:
        """What to save; it does not depend on the number of ranks."""
        return {"expected": self.expected_E, "movement": np.array([self._error, self._weight, self._guess])}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was saved."""
        self.expected_E = np.array(state["expected"], dtype=np.float64)
        self._error, self._weight, self._guess = map(float, state["movement"])
