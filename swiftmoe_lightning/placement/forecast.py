"""What the next step will bring, from the steps so far. L layers, E experts, W ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from swiftmoe_lightning.placement.balanced import DEFAULT_SPREAD

# The past fades by this much a step in the estimate of the spread; the guess before any step counts as this many.
_FADE: Final = 0.9
_GUESS_STEPS: Final = 5.0


@dataclass(frozen=True, eq=False)
class Forecast:
    """popularity_LE: [L, E] float, token-choices expected of the next step.

    spread_L: [L] float, how far experts' loads may be from it: var(load) / load, in mean loads of a rank.
    """

    popularity_LE: np.ndarray
    spread_L: np.ndarray


class Forecaster:
    """Expects of each expert what it got last, or a moving average of it, and keeps count of how far that was off.

    decay: 0 expects the last step again; d expects (1 - d) * last + d * what was expected of it.

    On traces recorded step by step the last step alone was as good as any average or better, so it is the default.
    """

    def __init__(self, num_layers: int, num_experts: int, world_size: int, decay: float = 0.0) -> None:
        self._world_size, self._decay = world_size, decay
        self._expected_LE = np.zeros((num_layers, num_experts))
        self._error_L = np.full(num_layers, _GUESS_STEPS * DEFAULT_SPREAD)
        self._weight_L = np.full(num_layers, _GUESS_STEPS)

    def update(self, popularity_LE: np.ndarray, layers: np.ndarray) -> Forecast:
        """Take in a step of some layers, and say what comes next for them.

        popularity_LE: [n, E] token-choices. layers: [n] int64, their indices. Layers without any tokens keep their
        expectation.
        """
        expected_LE = self._expected_LE[layers]
        total_L = popularity_LE.sum(1)
        known_L = (expected_LE.sum(1) > 0) & (total_L > 0)
        # Batches may grow: it is the shares that move.
        expected_LE = expected_LE * (total_L / np.maximum(expected_LE.sum(1), 1))[:, None]
        mean_L = np.maximum(total_L, 1) / self._world_size
        gap_L = ((popularity_LE - expected_LE) ** 2).sum(1) / np.maximum(2 * total_L, 1) / mean_L
        self._error_L[layers] = np.where(known_L, _FADE * self._error_L[layers] + gap_L, self._error_L[layers])
        self._weight_L[layers] = np.where(known_L, _FADE * self._weight_L[layers] + 1, self._weight_L[layers])
        decay_L1 = np.where(known_L, self._decay, 0.0)[:, None]
        next_LE = np.where(total_L[:, None] > 0, (1 - decay_L1) * popularity_LE + decay_L1 * expected_LE, expected_LE)
        self._expected_LE[layers] = next_LE
        return Forecast(next_LE, self._error_L[layers] / self._weight_L[layers])

    def state(self, layer: int) -> dict[str, np.ndarray]:
        """One layer's memory, to be saved."""
        return {
            "expected": self._expected_LE[layer],
            "error": np.array([self._error_L[layer], self._weight_L[layer]]),
        }

    def load_state(self, layer: int, state: dict[str, np.ndarray]) -> None:
        """Take up what `state` gave."""
        self._expected_LE[layer] = state["expected"]
        self._error_L[layer], self._weight_L[layer] = state["error"]
