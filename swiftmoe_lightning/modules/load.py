"""Counters of what a layer's experts were given; they only grow, so any number of readers can take differences.

W ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.placement import DispatchPlan, Placement

NON_FINITE_SCORES = (
    "the router gave non-finite scores in {where}. Training has diverged, or its input holds inf or nan: lower the "
    "learning rate, clip gradients, or add a z-loss (MoE(z_loss_coef=1e-3))."
)


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
    def alone(counts_E: np.ndarray) -> ExpertLoad:
        """A single device's, which drops nothing."""
        load_W = counts_E.sum(keepdims=True)
        return ExpertLoad(counts_E[None], load_W, load_W, 0)

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
        self._total = ExpertLoad.zero(placement.num_experts, placement.world_size)
        # [E + 1] int64: what one device counted, and forwards with non-finite scores, not yet asked for.
        self._on_device: Tensor | None = None

    @property
    def total(self) -> ExpertLoad:
        """Waits for the device if it has counted since.

        Raises FloatingPointError if scores were not finite.
        """
        if self._on_device is not None:
            numbers = self._on_device.cpu().numpy()
            self._on_device = None
            if numbers[-1]:
                raise FloatingPointError(NON_FINITE_SCORES.format(where="an Experts layer"))
            self._total = self._total + ExpertLoad.alone(numbers[:-1])
        return self._total

    def add(self, load: ExpertLoad, placement: Placement) -> None:
        self._total, self.placement = self.total + load, placement

    def add_on_device(self, counts_E: Tensor, scores_finite: Tensor) -> None:
        """The load of a single device, without waiting for it."""
        numbers = torch.cat([counts_E.to(torch.int64), scores_finite.logical_not().view(1).to(torch.int64)])
        self._on_device = numbers if self._on_device is None else self._on_device + numbers

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
