"""What a layer's next step will bring, from its steps so far. E experts, W ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

# var(load) / load, in mean loads of a rank, where nothing has been seen yet.
DEFAULT_SPREAD: Final = 0.2
# How many standard deviations a load may be above what is expected.
_DEVIATIONS: Final = 3.0
# The past fades by this much a step in the estimate of the spread; the guess before any step counts as this many.
_FADE: Final = 0.9
_GUESS_STEPS: Final = 5.0


@dataclass(frozen=True, eq=False)
class Forecast:
    """What is expected of the next step in L layers.

    Attributes:
        popularity_LE: [L, E] float, assignments.
        spread_L: [L] float, how far loads may be from it: var(load) / load, in mean loads of a rank.
    """

    popularity_LE: np.ndarray
    spread_L: np.ndarray

    @classmethod
    def of(cls, popularity_LE: np.ndarray, spread: float = DEFAULT_SPREAD) -> Forecast:
        """These loads, with one spread for all layers.

        Args:
            popularity_LE: [L, E] assignments.
            spread: var(load) / load, in mean loads of a rank.
        """
        return cls(popularity_LE, np.full(len(popularity_LE), spread))

    def loads(self, world_size: int, cold: float) -> tuple[np.ndarray, np.ndarray]:
        """Expected loads, and what they may come to, in mean loads of a rank.

        A layer of which nothing is known counts as uniform.

        Args:
            world_size: W.
            cold: what an expert without tokens counts as, in mean loads of a rank, for it may become hot.

        Returns:
            ([L, E] expected loads, [L, E] what they may come to), float: rows of the first add up to W. The second is
            load + 3 * sqrt(spread * (load + cold)): three standard deviations more.
        """
        popularity_LE = np.asarray(self.popularity_LE, dtype=np.float64)
        popularity_LE = np.where(popularity_LE.sum(1, keepdims=True) == 0, 1.0, popularity_LE)
        load_LE = popularity_LE * (world_size / popularity_LE.sum(1, keepdims=True))
        return load_LE, load_LE + _DEVIATIONS * np.sqrt(self.spread_L[:, None] * (load_LE + cold))


class Forecaster:
    """Expects of each expert what it got last, and keeps count of how far that was off.

    On traces recorded step by step the last step alone was as good as any moving average, or better.

    Args:
        num_experts: E.

    Attributes:
        expected_E: [E] float, assignments of the next step; all 0 before the first one.
    """

    def __init__(self, num_experts: int) -> None:
        self.expected_E = np.zeros(num_experts)
        # Sum of squared errors over loads, its weight, and the weight of the guess: all fade alike.
        self._error, self._weight, self._guess = 0.0, 0.0, _GUESS_STEPS

    def update(self, popularity_E: np.ndarray) -> None:
        """Take in a step: [E] assignments. One without any changes nothing."""
        total = popularity_E.sum()
        if total == 0:
            return
        before = self.expected_E.sum()
        if before == 0:
            self.expected_E = popularity_E.astype(np.float64)
            return
        # Batches may grow: it is the shares that move.
        expected_E = self.expected_E * (total / before)
        # Half, for both steps deviate from what is between them.
        error = ((popularity_E - expected_E) ** 2).sum() / (2 * float(total) ** 2)
        self._error, self._weight = _FADE * self._error + error, _FADE * self._weight + 1
        self._guess *= _FADE
        self.expected_E = popularity_E.astype(np.float64)

    def spread(self, world_size: int) -> float:
        """var(load) / load in mean loads of one of `world_size` ranks, about the expected loads."""
        return (self._guess * DEFAULT_SPREAD + world_size * self._error) / (self._guess + self._weight)

    def state_dict(self) -> dict[str, np.ndarray]:
        """To be saved; knows nothing of ranks."""
        return {"expected": self.expected_E, "movement": np.array([self._error, self._weight, self._guess])}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on where `state` was saved."""
        self.expected_E = np.array(state["expected"], dtype=np.float64)
        self._error, self._weight, self._guess = map(float, state["movement"])
