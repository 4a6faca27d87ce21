"""One layer's load: how many assignments its experts got, and how many its ranks computed. W ranks, E experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.token_split import DispatchPlan


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """Counts of assignments over all ranks, in one step or several. Every rank has the same numbers.

    Attributes:
        placement: where the experts were, in the last of the steps.
        counts_WE: [W, E] int64, assignments of each rank's tokens for each expert.
        wanted_W: [W] int64, assignments that went to each rank, before the cut at capacity.
        load_W: [W] int64, those of them that the rank computed; the others were over capacity.
        budget: the most assignments that a rank (or a slot) could compute; 0 without a capacity.
    """

    placement: Placement
    counts_WE: np.ndarray
    wanted_W: np.ndarray
    load_W: np.ndarray
    budget: int

    @classmethod
    def zero(cls, placement: Placement) -> ExpertLoad:
        """A load of no assignments."""
        zero_W = np.zeros(placement.world_size, np.int64)
        return cls(placement, np.zeros((placement.world_size, placement.num_experts), np.int64), zero_W, zero_W, 0)

    @classmethod
    def of(cls, counts_WE: np.ndarray, plan: DispatchPlan, placement: Placement) -> ExpertLoad:
        """The load of one step, from its plan.

        Args:
            counts_WE: [W, E] int64, assignments of each rank's tokens for each expert.
            plan: how they were split and cut.
            placement: where the experts were.
        """
        return cls(placement, counts_WE, plan.wanted_W, plan.load_W, plan.budget)

    def __add__(self, later: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(
            later.placement,
            self.counts_WE + later.counts_WE,
            self.wanted_W + later.wanted_W,
            self.load_W + later.load_W,
            self.budget + later.budget,
        )

    def __sub__(self, earlier: ExpertLoad) -> ExpertLoad:
        return ExpertLoad(
            self.placement,
            self.counts_WE - earlier.counts_WE,
            self.wanted_W - earlier.wanted_W,
            self.load_W - earlier.load_W,
            self.budget - earlier.budget,
        )

    @cached_property
    def popularity_E(self) -> np.ndarray:
        """[E] int64: assignments routed to each expert."""
        return self.counts_WE.sum(0)

    @property
    def num_assignments(self) -> int:
        """Assignments routed."""
        return int(self.popularity_E.sum())

    @property
    def num_dropped_tokens(self) -> int:
        """Assignments over capacity."""
        return int(self.wanted_W.sum() - self.load_W.sum())

    @property
    def imbalance(self) -> float:
        """See `imbalance`."""
        return float(imbalance(self.load_W))

    @property
    def token_survival_rate(self) -> float:
        """Share of assignments that were computed, 0..1."""
        return 1.0 - self.num_dropped_tokens / self.num_assignments if self.num_assignments else 1.0


def imbalance(load_W: np.ndarray) -> np.ndarray:
    """Largest load over mean load: 1.0 is perfect. Also 1.0 where nothing was computed.

    Args:
        load_W: [..., W] assignments that ranks computed.

    Returns:
        [...] float.
    """
    total = load_W.sum(-1)
    return np.where(total > 0, load_W.max(-1) * load_W.shape[-1] / np.maximum(total, 1), 1.0)
