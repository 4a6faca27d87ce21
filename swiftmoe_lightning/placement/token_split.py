"""Which host gets which tokens: exact integer tables from this step's counts and the placement.

W ranks, E experts, S slots, D hosted (rank, expert) pairs ordered by (rank, expert). A token-choice is one token's
choice of one expert; a token with top-k routing makes k of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swiftmoe_lightning.config import TOKEN_SPLITS, check_choice
from swiftmoe_lightning.placement.placement import Placement


@dataclass(frozen=True)
class Capacity:
    """How many token-choices are computed at the most.

    factor: budgets are `factor` times the mean load.
    per: "rank", one budget of ceil(factor * N / W) for each rank, pooled over its slots; or "slot", the paper's
        ceil(factor * N / S) for each slot, N being the token-choices of all ranks.

    Raises ValueError for a factor that is not a number above 0, or an unknown `per`.
    """

    factor: float
    per: str = "rank"

    def __post_init__(self) -> None:
        if not 0 < self.factor < float("inf"):
            raise ValueError(
                f"capacity_factor must be a number above 0, got {self.factor!r}. Use 1.0 or more, or None to drop no "
                "tokens."
            )
        check_choice("capacity", self.per, ("rank", "slot"))


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Who sends how many token-choices to whom in one layer; the same on every rank.

    assigned_WD: [W, D] int64, choices of source rank w for hosted pair d; w's own row adds up to its counts.
    kept_WB: [W, B] int64, how many of them survive in each budget. Budgets are the W ranks, or the D pairs.
    budget_of_pair_D: [D] int64, the budget each pair draws on.
    """

    placement: Placement
    assigned_WD: np.ndarray
    kept_WB: np.ndarray
    budget_of_pair_D: np.ndarray

    @property
    def num_dropped_tokens(self) -> int:
        """Token-choices over budget, all ranks."""
        return int(self.assigned_WD.sum() - self.kept_WB.sum())

    @cached_property
    def rows_WW(self) -> np.ndarray:
        """[W, W] int64: surviving choices that source w sends to host h, the all-to-all's split sizes."""
        if self.kept_WB.shape[1] == self.placement.world_size:
            return self.kept_WB
        return sum_by_host(self.kept_WB, self.placement)

    @property
    def load_W(self) -> np.ndarray:
        """[W] int64: token-choices that each rank computes."""
        return self.rows_WW.sum(0)


def plan_dispatch(
    counts_WE: np.ndarray,
    placement: Placement,
    split: str = "local",
    capacity: Capacity | None = None,
    ranks_per_node: int = 1,
) -> DispatchPlan:
    """Share every expert's token-choices over its hosts, then cut what is over budget.

    counts_WE: [W, E] int64, token-choices of each rank for each expert.
    split: "even" or "local", see `split_tokens`.
    capacity: None drops nothing.

    Over budget, each source keeps its share of the budget, in proportion to what it would have sent; which choices
    those are (the highest router scores) only the source can tell, so they are not part of the plan.
    """
    assigned_WD = split_tokens(counts_WE, placement, split, ranks_per_node)
    if capacity is not None and capacity.per == "slot":
        per_slot = _budget(capacity.factor, counts_WE, placement.slot_to_expert_S.size)
        kept_WD = _share_budget(assigned_WD, per_slot * placement.pair_slots_D)
        return DispatchPlan(placement, assigned_WD, kept_WD, np.arange(len(placement.pair_host_D)))
    rows_WW = sum_by_host(assigned_WD, placement)
    if capacity is not None:
        per_rank = _budget(capacity.factor, counts_WE, placement.world_size)
        rows_WW = _share_budget(rows_WW, np.full(placement.world_size, per_rank))
    return DispatchPlan(placement, assigned_WD, rows_WW, placement.pair_host_D)


def split_tokens(counts_WE: np.ndarray, placement: Placement, split: str, ranks_per_node: int = 1) -> np.ndarray:
    """[W, D] int64: how many of rank w's choices of pair d's expert go to that host; exact, nothing lost.

    Hosts of an expert get equal shares a slot, cut at whole tokens. "even" lays sources and hosts side by side on
    the line [0, load): overlaps say who sends what. "local" first lets every rank serve itself within its share,
    then every node its ranks, and spreads only the rest over the world, by the same overlaps.
    """
    check_choice("token_split", split, TOKEN_SPLITS)
    by_expert = _PairsByExpert(placement)
    supply_WD = counts_WE[:, by_expert.expert_D]
    demand_D = by_expert.shares(counts_WE.sum(0))
    group_sizes = [placement.world_size] if split == "even" else [1, ranks_per_node, placement.world_size]
    moved_WD = np.zeros_like(supply_WD)
    for size in sorted(set(group_sizes)):
        step_WD = by_expert.overlap(supply_WD, demand_D, size)
        sent_WE = by_expert.sum_by_expert(step_WD)
        supply_WD = supply_WD - sent_WE[:, by_expert.expert_D]
        demand_D = demand_D - step_WD.sum(0)
        moved_WD += step_WD
    assigned_WD = np.empty_like(moved_WD)
    assigned_WD[:, by_expert.order_D] = moved_WD
    return assigned_WD


class _PairsByExpert:
    """The hosted pairs in order (expert, host): neighbours on an expert's line stand side by side."""

    def __init__(self, placement: Placement) -> None:
        self.order_D = np.lexsort((placement.pair_host_D, placement.pair_expert_D))
        self.expert_D = placement.pair_expert_D[self.order_D]
        self.host_D = placement.pair_host_D[self.order_D]
        self.slots_D = placement.pair_slots_D[self.order_D]
        self.start_E = np.searchsorted(self.expert_D, np.arange(placement.num_experts))

    def shares(self, load_E: np.ndarray) -> np.ndarray:
        """[D] int64: an expert's load cut in equal parts a slot, at whole tokens."""
        before_D = exclusive_cumsum(self.slots_D)
        before_D = before_D - before_D[self.start_E][self.expert_D]
        replicas_D = np.add.reduceat(self.slots_D, self.start_E)[self.expert_D]
        load_D = load_E[self.expert_D]
        return load_D * (before_D + self.slots_D) // replicas_D - load_D * before_D // replicas_D

    def overlap(self, supply_WD: np.ndarray, demand_D: np.ndarray, group_size: int) -> np.ndarray:
        """[W, D]: tokens that flow inside groups of `group_size` neighbouring ranks, sources and hosts in rank order.

        Sources lie on one line [0, supply of the group), hosts on another; the overlap of two intervals flows.
        """
        ranks_W = np.arange(len(supply_WD))
        before_WD = exclusive_cumsum(supply_WD)
        before_WD -= before_WD[ranks_W // group_size * group_size]
        line_D = exclusive_cumsum(demand_D)
        group_D = self.host_D // group_size
        is_first_D = np.r_[True, (self.expert_D[1:] != self.expert_D[:-1]) | (group_D[1:] != group_D[:-1])]
        line_D = line_D - line_D[np.maximum.accumulate(np.where(is_first_D, np.arange(len(line_D)), 0))]
        overlap_WD = np.minimum(before_WD + supply_WD, line_D + demand_D) - np.maximum(before_WD, line_D)
        return np.where(ranks_W[:, None] // group_size == group_D, np.maximum(overlap_WD, 0), 0)

    def sum_by_expert(self, values_WD: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values_WD, self.start_E, axis=1)


def sum_by_host(values_WD: np.ndarray, placement: Placement) -> np.ndarray:
    """[W, D] per hosted pair -> [W, W] per host; every rank hosts at least one expert."""
    return np.add.reduceat(values_WD, exclusive_cumsum(placement.num_hosted_W), axis=1)


def exclusive_cumsum(values: np.ndarray) -> np.ndarray:
    """Sum of all earlier entries along the first dim."""
    return np.cumsum(values, axis=0) - values


def _budget(factor: float, counts_WE: np.ndarray, parts: int) -> int:
    return int(np.ceil(factor * counts_WE.sum() / parts))


def _share_budget(sent_WB: np.ndarray, budget_B: np.ndarray) -> np.ndarray:
    """[W, B]: sources share each budget in proportion to what they send; whole tokens, and the budget is used up."""
    total_B = sent_WB.sum(0)
    before_WB = exclusive_cumsum(sent_WB)
    safe_B = np.maximum(total_B, 1)
    share_WB = budget_B * (before_WB + sent_WB) // safe_B - budget_B * before_WB // safe_B
    return np.where(total_B > budget_B, share_WB, sent_WB)
