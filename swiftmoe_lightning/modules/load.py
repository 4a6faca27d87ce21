"""Counters of what a layer's experts were given; they only grow, so any number of readers can take differences.

W ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from swiftmoe_lightning.placement import DispatchPlan, Placement


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Token-choices of all ranks: the same numbers on every rank.

    counts_WE: [W, E] int64, token-choices of each rank's tokens for each expert.
    wanted_W: [W] int64, token-choices that went to each rank.
    load_W: [W] int64, those of them that it computed; the others were over capacity.
    budget: token-choices that a rank (or a slot) might have computed; 0 without a capacity.
    """

    counts_WE: np.ndarray
    wanted_W: np.ndarray
    load_W: np.ndarray
    budget: int

    @staticmethod
    def zero(num_experts: int, world_size: int) -> ExpertLoad:
        zero_W = np.zeros(world_size, np.int64)
        return ExpertLoad(np.zeros((world_size, num_experts), np.int64), zero_W, zero_W, 0)

    @staticmethod
    def of(counts_WE: np.ndarray, plan: DispatchPlan) -> ExpertLoad:
        return ExpertLoad(counts_WE, plan.wanted_W, plan.load_W, plan.budget)

    def __add__(self, other: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(
            self.counts_WE + other.counts_WE,
            self.wanted_W + other.wanted_W,
            self.load_W + other.load_W,
            self.budget + other.budget,
        )

    def __sub__(self, other: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(
            self.counts_WE - other.counts_WE,
            self.wanted_W - other.wanted_W,
            self.load_W - other.load_W,
            self.budget - other.budget,
        )

    @cached_property
    def popularity_E(self) -> np.ndarray:
        """[E] int64: token-choices routed to each expert."""
        return self.counts_WE.sum(0)

    @property
    def num_choices(self) -> int:
        """Token-choices routed."""
        return int(self.popularity_E.sum())

    @property
    def num_dropped_tokens(self) -> int:
        """Token-choices over capacity."""
        return int(self.wanted_W.sum() - self.load_W.sum())

    @property
    def imbalance(self) -> float:
        """Largest load of a rank over the mean load; 1.0 is perfect (and the value when nothing was computed)."""
        total = int(self.load_W.sum())
        return float(self.load_W.max() * len(self.load_W) / total) if total else 1.0

    @property
    def token_survival_rate(self) -> float:
        """Share of token-choices that were computed, 0..1."""
        return 1.0 - self.num_dropped_tokens / self.num_choices if self.num_choices else 1.0


class TrainedLoad:
    """A layer's load since it was built: `total`, and the placement that the last trained step ran with."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.total = ExpertLoad.zero(placement.num_experts, placement.world_size)

    def add(self, load: ExpertLoad, placement: Placement) -> None:
        self.placement = placement
        self.total = self.total + load

    def since(self, earlier: ExpertLoad) -> ExpertLoad:
        """What was trained after `earlier`, an earlier `total`; everything, if the ranks were others then."""
        return self.total - earlier if earlier.load_W.shape == self.total.load_W.shape else self.total


class OnceInBackward:
    """Calls `action` the first time that backward reaches `mark(out)`.

    Activation checkpointing runs forward twice, and validation never runs backward: so what is counted here is
    counted once for each trained token-choice.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def mark(self, out: Tensor) -> Tensor:
        """`out` itself, with the action tied to its gradient."""
        if out.requires_grad:
            out.register_hook(self._run)
        return out

    def _run(self, _: Any) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()
