"""Which host gets which tokens: exact integers from this step's counts and the placement.

W ranks, E experts, S slots, P hosted (rank, expert) pairs ordered by (rank, expert), d pairs of one rank, B budgets.
An assignment is one token's choice of one expert; a token with top-k routing makes k of them.

A plan is kept as prefix sums over source ranks, from which every rank reads its own row and column in O(P + W d):
the table of all ranks has W P entries, and nobody needs it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from swiftmoe_lightning.config import TOKEN_SPLITS, check_choice, is_number
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.shares import balanced_shares, uniform_shares

# Budgets stay within int64 up to it, and far below it nothing is dropped any more.
_LARGEST_FACTOR: Final = 1000


@dataclass(frozen=True)
class Capacity:
    """How many assignments are computed at the most.

    Attributes:
        factor: budgets are `factor` times the mean load.
        per: "rank", one budget of ceil(factor * N / W) for each rank, pooled over its slots; or "slot", the paper's
            ceil(factor * N / S) for each slot, N being the assignments of all ranks.

    Raises:
        ValueError: for a factor that is not a number above 0, at most 1000, or an unknown `per`.
    """

    factor: float
    per: str = "rank"

    def __post_init__(self) -> None:
        if not is_number(self.factor) or not 0 < self.factor < float("inf"):
            raise ValueError(
                f"capacity_factor must be a number above 0, got {self.factor!r}. Use 1.0 or more, or None to drop no "
                "tokens."
            )
        if self.factor > _LARGEST_FACTOR:
            raise ValueError(
                f"capacity_factor must be at most {_LARGEST_FACTOR}, got {self.factor!r}. Use None to drop no tokens."
            )
        check_choice("capacity_per", self.per, ("rank", "slot"))

    def budget(self, num_assignments: int, placement: Placement) -> int:
        """Assignments that one rank (or slot) computes at the most.

        Args:
            num_assignments: N, in all.
            placement: the ranks and slots.
        """
        parts = placement.world_size if self.per == "rank" else placement.slot_to_expert_S.size
        return int(np.ceil(self.factor * num_assignments / parts))


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's side of a `DispatchPlan`.

    Attributes:
        sent_P: [P] int64, its choices for each hosted pair, before the cut at capacity.
        kept_B: [B] int64, how many of them survive in each budget. Which ones (the highest router scores) only it can
            tell, so that is not part of the plan.
        received_Wd: [W, d] int64, what it gets from each source for each expert it hosts, before the cut.
        send_splits: [W] surviving choices to each host.
        receive_splits: [W] surviving choices from each source.
    """

    sent_P: np.ndarray
    kept_B: np.ndarray
    received_Wd: np.ndarray
    send_splits: list[int]
    receive_splits: list[int]


class DispatchPlan:
    """Who sends how many assignments to whom in one layer, before and after the cut at capacity.

    Over budget, sources share the budget in proportion to what they send to it.

    Args:
        counts_WE: [W, E] int64, assignments of each rank for each expert.
        placement: the hosts.
        share_P: [P] int64, choices that go to each hosted pair; an expert's add up to its load.
        capacity: None drops nothing.
        ranks_per_node: neighbours on a node; 0 lets no rank serve itself or its node first.

    Attributes:
        budget_of_pair_P: [P] int64, the budget each pair draws on: its rank's, or its own.
        budget: assignments that a rank (or a slot) computes at the most; 0 without a capacity.
    """

    def __init__(
        self,
        counts_WE: np.ndarray,
        placement: Placement,
        share_P: np.ndarray,
        capacity: Capacity | None,
        ranks_per_node: int,
    ) -> None:
        self._counts_WE, self._ranks_per_node = counts_WE, ranks_per_node
        self.placement, self.share_P = placement, share_P
        self._pooled = capacity is None or capacity.per == "rank"
        self.budget_of_pair_P = placement.pair_host_P if self._pooled else np.arange(len(share_P))
        self._wanted_B = self._sum_by_budget(share_P)
        self._budget_B = self._wanted_B
        self.budget = 0
        if capacity is not None:
            self.budget = capacity.budget(int(share_P.sum()), placement)
            slots_B = np.ones_like(self._wanted_B) if self._pooled else placement.pair_slots_P
            self._budget_B = self.budget * slots_B

    @cached_property
    def _routes(self) -> _Routes:
        return _Routes(self._counts_WE, self.placement, self.share_P, self._ranks_per_node)

    @cached_property
    def _kept_B(self) -> np.ndarray:
        return np.minimum(self._wanted_B, self._budget_B)

    @property
    def num_dropped_tokens(self) -> int:
        """Assignments over budget, all ranks."""
        return int(self._wanted_B.sum() - self._kept_B.sum())

    @property
    def wanted_W(self) -> np.ndarray:
        """[W] int64: assignments that go to each rank, before the cut."""
        return self._wanted_B if self._pooled else sum_by_host(self._wanted_B, self.placement)

    @property
    def load_W(self) -> np.ndarray:
        """[W] int64: assignments that each rank computes."""
        return self._kept_B if self._pooled else sum_by_host(self._kept_B, self.placement)

    def for_rank(self, rank: int) -> RankPlan:
        """What `rank` has to know of the plan."""
        num_ranks = self.placement.world_size
        row_2P = self._routes.before(np.array([rank, rank + 1]), np.arange(len(self.share_P)))
        kept_2B = self._cut(self._sum_by_budget(row_2P), self._wanted_B, self._kept_B)
        kept_B = kept_2B[1] - kept_2B[0]
        pairs = np.flatnonzero(self.placement.pair_host_P == rank)
        column_Nd = self._routes.before(np.arange(num_ranks + 1), pairs)
        if self._pooled:
            kept_N = self._cut(column_Nd.sum(1), self._wanted_B[rank], self._kept_B[rank])
        else:
            kept_N = self._cut(column_Nd, self._wanted_B[pairs], self._kept_B[pairs]).sum(1)
        return RankPlan(
            sent_P=row_2P[1] - row_2P[0],
            kept_B=kept_B,
            received_Wd=np.diff(column_Nd, axis=0),
            send_splits=(kept_B if self._pooled else sum_by_host(kept_B, self.placement)).tolist(),
            receive_splits=np.diff(kept_N).tolist(),
        )

    def _sum_by_budget(self, values_xD: np.ndarray) -> np.ndarray:
        return sum_by_host(values_xD, self.placement) if self._pooled else values_xD

    @staticmethod
    def _cut(before: np.ndarray, wanted: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Prefix sums before the cut -> after it: whole tokens, in proportion, and the budget is used up."""
        return kept * before // np.maximum(wanted, 1)


def plan_dispatch(
    counts_WE: np.ndarray,
    placement: Placement,
    split: str = "balanced",
    capacity: Capacity | None = None,
    ranks_per_node: int = 1,
) -> DispatchPlan:
    """Share every expert's assignments over its hosts, say who sends them, and cut what is over budget.

    Args:
        counts_WE: [W, E] int64, assignments of each rank for each expert.
        placement: the hosts.
        split: "uniform" cuts an expert's load in equal parts a slot, and lays sources and hosts side by side on the
            line [0, load): overlaps say who sends what. "local_first" takes the same parts, but first lets every rank
            serve itself, then every node its ranks, and spreads only the rest over the world. "balanced" does the same
            with parts that make the loads of all ranks as even as the placement allows.
        capacity: None drops nothing.
        ranks_per_node: neighbours on a node.

    Raises:
        ValueError: for an unknown `split`.
    """
    check_choice("token_split", split, TOKEN_SPLITS)
    # With a budget for each slot, equal parts a slot are the best there is.
    is_balanced = split == "balanced" and (capacity is None or capacity.per == "rank")
    share_P = (balanced_shares if is_balanced else uniform_shares)(counts_WE.sum(0), placement)
    return DispatchPlan(counts_WE, placement, share_P, capacity, 0 if split == "uniform" else ranks_per_node)


class _Routes:
    """Who sends what to whom, as prefix sums over source ranks.

    Three rounds share out what is left: a rank's own tokens to itself, a node's to its ranks, the rest over the
    world. Inside a round sources lie on one line [0, supply), the hosts' open shares on another, both in rank order;
    the overlap of two intervals flows. So what sources 0..r-1 send to a pair is the overlap of a prefix: no table.

    ranks_per_node: 0 skips the first two rounds.
    """

    def __init__(self, counts_WE: np.ndarray, placement: Placement, share_P: np.ndarray, ranks_per_node: int) -> None:
        order_P = placement.by_expert_P
        self._host_P, self._expert_P = placement.pair_host_P, placement.pair_expert_P
        supply_WE, open_P = counts_WE, share_P
        self._own_P: np.ndarray | None = None
        self._node: _Round | None = None
        if ranks_per_node:
            self._own_P = np.minimum(counts_WE[self._host_P, self._expert_P], share_P)
            supply_WE = counts_WE.copy()
            supply_WE[self._host_P, self._expert_P] -= self._own_P
            open_P = share_P - self._own_P
        if 1 < ranks_per_node < placement.world_size:
            self._node = _Round(supply_WE, open_P, placement, order_P, ranks_per_node)
            supply_WE = self._node.supply_left_WE
            open_P = open_P - self._node.taken_P
        self._world = _Round(supply_WE, open_P, placement, order_P, placement.world_size)

    def before(self, ranks_N: np.ndarray, pairs_P: np.ndarray) -> np.ndarray:
        """[N, P] int64: choices of the sources below ranks_N[n] that go to pair pairs_P[p]."""
        total_NP = self._world.before(ranks_N, pairs_P)
        if self._node is not None:
            total_NP = total_NP + self._node.before(ranks_N, pairs_P)
        if self._own_P is not None:
            total_NP = total_NP + self._own_P[pairs_P] * (ranks_N[:, None] > self._host_P[pairs_P])
        return total_NP


class _Round:
    """One round over groups of `group_size` neighbouring ranks."""

    def __init__(
        self, supply_WE: np.ndarray, open_P: np.ndarray, placement: Placement, order_P: np.ndarray, group_size: int
    ) -> None:
        self._supply_WE, self._open_P, self._expert_P = supply_WE, open_P, placement.pair_expert_P
        self._first_P = placement.pair_host_P // group_size * group_size
        self._last_P = np.minimum(self._first_P + group_size, placement.world_size)
        # [W + 1, E]: supply of the sources below each rank.
        self._prefix_NE = np.zeros((len(supply_WE) + 1, supply_WE.shape[1]), dtype=np.int64)
        np.cumsum(supply_WE, axis=0, out=self._prefix_NE[1:])
        # Where each pair's open share begins on the line of its expert and group.
        ordered_P = open_P[order_P]
        line_P = np.cumsum(ordered_P) - ordered_P
        expert_P, group_P = self._expert_P[order_P], self._first_P[order_P]
        is_first_P = np.r_[True, (expert_P[1:] != expert_P[:-1]) | (group_P[1:] != group_P[:-1])]
        line_P -= line_P[np.maximum.accumulate(np.where(is_first_P, np.arange(len(line_P)), 0))]
        self._line_P = np.empty_like(line_P)
        self._line_P[order_P] = line_P
        self._group_size = group_size

    def before(self, ranks_N: np.ndarray, pairs_P: np.ndarray) -> np.ndarray:
        first_P, expert_P = self._first_P[pairs_P], self._expert_P[pairs_P]
        ranks_NP = np.clip(ranks_N[:, None], first_P, self._last_P[pairs_P])
        supply_NP = self._prefix_NE[ranks_NP, expert_P] - self._prefix_NE[first_P, expert_P]
        return np.clip(supply_NP - self._line_P[pairs_P], 0, self._open_P[pairs_P])

    @property
    def taken_P(self) -> np.ndarray:
        """[P]: what the round gives each pair."""
        supply_P = self._prefix_NE[self._last_P, self._expert_P] - self._prefix_NE[self._first_P, self._expert_P]
        return np.clip(supply_P - self._line_P, 0, self._open_P)

    @property
    def supply_left_WE(self) -> np.ndarray:
        """[W, E]: what the sources still have after it."""
        num_ranks = len(self._supply_WE)
        first_W = np.arange(num_ranks) // self._group_size * self._group_size
        num_groups = -(-num_ranks // self._group_size)
        open_GE = np.zeros((num_groups, self._supply_WE.shape[1]), dtype=np.int64)
        np.add.at(open_GE, (self._first_P // self._group_size, self._expert_P), self._open_P)
        open_WE = open_GE[first_W // self._group_size]
        start_WE = self._prefix_NE[:-1] - self._prefix_NE[first_W]
        sent_WE = np.minimum(start_WE + self._supply_WE, open_WE) - np.minimum(start_WE, open_WE)
        return self._supply_WE - sent_WE


def sum_by_host(values_xD: np.ndarray, placement: Placement) -> np.ndarray:
    """[..., P] per hosted pair -> [..., W] per host; every rank hosts at least one expert."""
    starts_W = np.cumsum(placement.num_hosted_W) - placement.num_hosted_W
    return np.add.reduceat(values_xD, starts_W, axis=-1)
