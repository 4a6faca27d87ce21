"""How many assignments each rank sends to each other one: exact integers from a step's counts and the placement.

W ranks, E experts, S slots, P (rank, expert) pairs ordered by (rank, expert), d pairs of one rank, B budgets, Q = W + 1
places in a prefix sum over source ranks. An assignment is a token with one of its K experts.

The whole table has W * P entries, of which a rank needs its row and its columns: P + W * d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from swiftmoe_lightning.config import TOKEN_SPLITS, check_choice, is_number
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.routes import Routes
from swiftmoe_lightning.placement.shares import balanced_shares, uniform_shares

# Up to this factor budgets fit into int64; nothing is dropped at far smaller ones.
_LARGEST_FACTOR: Final = 1000


@dataclass(frozen=True)
class Capacity:
    """The most assignments that a rank, or a slot, computes.

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
            num_assignments: N, of all ranks.
            placement: the ranks and slots.
        """
        parts = placement.world_size if self.per == "rank" else placement.slot_to_expert_S.size
        return int(np.ceil(self.factor * num_assignments / parts))


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's part of a `DispatchPlan`.

    Attributes:
        sent_P: [P] int64, assignments that it sends to each pair, before the cut at capacity.
        kept_B: [B] int64, how many of them survive in each budget. The plan does not say which: those with the highest
            router scores, which only this rank knows.
        received_Wd: [W, d] int64, assignments that it gets from each source for each of its experts, before the cut.
        send_splits: [W] surviving assignments to each rank.
        receive_splits: [W] surviving assignments from each source.
    """

    sent_P: np.ndarray
    kept_B: np.ndarray
    received_Wd: np.ndarray
    send_splits: list[int]
    receive_splits: list[int]


class DispatchPlan:
    """Who sends how many assignments to whom in one layer, before and after the cut at capacity.

    Where more is sent than a budget holds, its sources share it in proportion to what they send.

    Args:
        counts_WE: [W, E] int64, assignments of each rank for each expert.
        placement: which ranks have which expert.
        share_P: [P] int64, assignments that go to each pair; those of an expert's pairs add up to its load.
        capacity: None drops nothing.
        ranks_per_node: neighbours on a node; 0 lets no rank serve itself or its node first.

    Attributes:
        budget_of_pair_P: [P] int64, the index of each pair's budget: with one budget a rank that of its rank, with one
            a slot its own (of all its slots).
        budget: the most assignments that a rank (or a slot) computes; 0 without a capacity.
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
        self.budget_of_pair_P = placement.pair_rank_P if self._pooled else np.arange(len(share_P))
        self._wanted_B = self._sum_by_budget(share_P)
        self._budget_B = self._wanted_B
        self.budget = 0
        if capacity is not None:
            self.budget = capacity.budget(int(share_P.sum()), placement)
            slots_B = np.ones_like(self._wanted_B) if self._pooled else placement.pair_slots_P
            self._budget_B = self.budget * slots_B

    @cached_property
    def _routes(self) -> Routes:
        return Routes(self._counts_WE, self.placement, self.share_P, self._ranks_per_node)

    @cached_property
    def _kept_B(self) -> np.ndarray:
        return np.minimum(self._wanted_B, self._budget_B)

    @cached_property
    def num_dropped_tokens(self) -> int:
        """Assignments over budget, all ranks."""
        return int(self._wanted_B.sum() - self._kept_B.sum())

    @property
    def wanted_W(self) -> np.ndarray:
        """[W] int64: assignments that go to each rank, before the cut."""
        return self._wanted_B if self._pooled else self.placement.sum_by_rank(self._wanted_B)

    @property
    def load_W(self) -> np.ndarray:
        """[W] int64: assignments that each rank computes."""
        return self._kept_B if self._pooled else self.placement.sum_by_rank(self._kept_B)

    def for_rank(self, rank: int) -> RankPlan:
        """The part of the plan that `rank` needs."""
        row_2P, column_Qd = self._routes.sent_before(rank), self._routes.received_before(rank)
        kept_2B = self._cut(self._sum_by_budget(row_2P), slice(None))
        kept_B = kept_2B[1] - kept_2B[0]
        if self._pooled:
            kept_Q = self._cut(column_Qd.sum(1, keepdims=True), slice(rank, rank + 1))[:, 0]
        else:
            kept_Q = self._cut(column_Qd, self.placement.pairs_of(rank, rank + 1)).sum(1)
        return RankPlan(
            sent_P=row_2P[1] - row_2P[0],
            kept_B=kept_B,
            received_Wd=column_Qd[1:] - column_Qd[:-1],
            send_splits=(kept_B if self._pooled else self.placement.sum_by_rank(kept_B)).tolist(),
            receive_splits=(kept_Q[1:] - kept_Q[:-1]).tolist(),
        )

    def _sum_by_budget(self, values_xP: np.ndarray) -> np.ndarray:
        return self.placement.sum_by_rank(values_xP) if self._pooled else values_xP

    def _cut(self, before_xb: np.ndarray, budgets: slice) -> np.ndarray:
        """Prefix sums before the cut -> after it: in proportion, in whole assignments, and the budget is used up.

        A budget of 6, wanted by three sources that send 4, 5 and 3:

            before         0   4   9   12
            after          0   2   4   6       6 * before // 12: the sources keep 2, 2 and 2

        Args:
            before_xb: [..., b], of these budgets.
            budgets: which.
        """
        if not self.num_dropped_tokens:
            return before_xb
        return self._kept_B[budgets] * before_xb // np.maximum(self._wanted_B[budgets], 1)


def plan_dispatch(
    counts_WE: np.ndarray,
    placement: Placement,
    split: str = "balanced",
    capacity: Capacity | None = None,
    ranks_per_node: int = 1,
) -> DispatchPlan:
    """Share every expert's assignments among its ranks, fix which ranks send them, and cut what is over budget.

    Args:
        counts_WE: [W, E] int64, assignments of each rank for each expert.
        placement: which ranks have which expert.
        split: "uniform" cuts an expert's load in equal parts, one a slot, and cuts the line [0, load) twice, once
            among its sources and once among its ranks: where the two intervals overlap, the source sends to the rank.
            "local_first" takes the same parts, but first every rank serves itself, then every node its ranks, and only
            the rest is spread over all ranks. "balanced" sends likewise, with parts that make the loads of all ranks as
            even as the placement allows.
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
