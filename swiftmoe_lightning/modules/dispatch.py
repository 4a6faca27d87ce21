"""Carries out this rank's part of a `DispatchPlan`: sends tokens to their experts' ranks, and the results back.

W ranks, B budgets, P (rank, expert) pairs, d experts of this rank, T tokens, D model dim, K top-k, N = T * K
assignments, R rows received. M: rows sent, this rank's assignments that survive.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.modules.context import ExpertParallelContext
from swiftmoe_lightning.ops import SortedAssignments, combine, permute, sort_assignments, unpermute
from swiftmoe_lightning.placement import DispatchPlan, RankPlan


def sort_by_pair(
    by_expert: SortedAssignments, weights_TK: Tensor, plan: DispatchPlan, rank_plan: RankPlan
) -> SortedAssignments:
    """Sort this rank's assignments by pair, and drop those over budget: in each budget the ones of lowest score.

    Args:
        by_expert: this rank's assignments, sorted by expert. Those of expert ids outside 0..E-1 have no row (Hugging
            Face marks experts of other ranks so).
        weights_TK: [T, K] floating, the router's scores of the assignments.
        plan: what all ranks send and drop.
        rank_plan: this rank's part of it.

    Returns:
        The M rows that this rank sends, by (rank, expert) and then by token; none is unassigned.
    """
    device = weights_TK.device
    order_P = plan.placement.by_expert_P
    sent_P = rank_plan.sent_P[order_P]
    assigned = torch.from_numpy(sent_P).to(device)
    num_assigned = int(sent_P.sum())
    pair_N = torch.from_numpy(order_P).to(device).repeat_interleave(assigned, output_size=num_assigned)
    assignment_N = by_expert.assignment_R[:num_assigned]
    if plan.num_dropped_tokens:
        kept_N = _keep_best(
            weights_TK.detach().flatten()[assignment_N], pair_N, plan.budget_of_pair_P, rank_plan.kept_B
        )
        assignment_N, pair_N = assignment_N[kept_N], pair_N[kept_N]
    pair_TK = torch.full(weights_TK.shape, -1, device=device)
    pair_TK.view(-1)[assignment_N] = pair_N
    by_pair = sort_assignments(pair_TK, len(order_P))
    return by_pair._replace(assignment_R=by_pair.assignment_R[: len(pair_N)])


def _keep_best(score_N: Tensor, pair_N: Tensor, budget_of_pair_P: np.ndarray, kept_B: np.ndarray) -> Tensor:
    """Ascending indices, into N, of the surviving assignments: in each budget the best scores, of equals the first."""
    budget_N = torch.from_numpy(budget_of_pair_P).to(pair_N.device)[pair_N]
    best_first_N = torch.argsort(score_N, descending=True, stable=True)
    order_N = best_first_N[torch.argsort(budget_N[best_first_N], stable=True)]
    budget_N = budget_N[order_N]
    sizes_B = _count(budget_N, len(kept_B))
    index_N = torch.arange(len(order_N), device=pair_N.device) - (sizes_B.cumsum(0) - sizes_B)[budget_N]
    return order_N[index_N < torch.from_numpy(kept_B).to(index_N.device)[budget_N]].sort().values


def _count(group_N: Tensor, num_groups: int) -> Tensor:
    """[num_groups] int64: how often each group occurs. (`bincount` would wait for a GPU.)"""
    counts = torch.zeros(num_groups, dtype=torch.int64, device=group_N.device)
    return counts.scatter_add_(0, group_N, torch.ones_like(group_N))


def sort_by_slot(counts_Vd: Tensor, num_rows: int, slots_per_rank: int) -> SortedAssignments:
    """Sort the rows that have arrived by the slots of this rank. Slots that only repeat an expert of it get none.

    Args:
        counts_Vd: [sources, d] int, rows from each source for each expert of this rank.
        num_rows: R, their sum.
        slots_per_rank: s.
    """
    expert_R = torch.arange(counts_Vd.shape[1], device=counts_Vd.device).repeat(len(counts_Vd))
    expert_R = expert_R.repeat_interleave(counts_Vd.flatten(), output_size=num_rows)
    return sort_assignments(expert_R.unsqueeze(1), slots_per_rank)


class TokenDispatcher:
    """Sends one forward's tokens to their experts' ranks, and the results back.

    Args:
        context: exchanges the rows.
        plan: what all ranks send and drop.
        rank_plan: this rank's part of it.
        by_pair: the rows that this rank sends, sorted by pair.
        weights_TK: [T, K], the weight of each assignment in its token's sum.
    """

    def __init__(
        self,
        context: ExpertParallelContext,
        plan: DispatchPlan,
        rank_plan: RankPlan,
        by_pair: SortedAssignments,
        weights_TK: Tensor,
    ) -> None:
        self._context, self._plan, self._rank_plan = context, plan, rank_plan
        self._by_pair, self._weights_TK = by_pair, weights_TK

    def dispatch(self, x_TD: Tensor) -> tuple[Tensor, SortedAssignments]:
        """[T, D] -> ([R, D] rows as they arrived, the same sorted by the slots of this rank)."""
        rows_MD = permute(x_TD, self._by_pair)
        arrived_RD = self._context.exchange_rows(rows_MD, self._rank_plan.send_splits, self._rank_plan.receive_splits)
        self._by_slot = sort_by_slot(self._received_counts(), len(arrived_RD), self._plan.placement.slots_per_rank)
        return arrived_RD, self._by_slot

    def combine(self, y_RD: Tensor) -> Tensor:
        """[R, D] expert outputs, by slot -> [T, D], each token's weighted sum; a dropped assignment adds zero.

        Args:
            y_RD: outputs of the rows that `dispatch` returned, sorted by slot.
        """
        arrived_RD = unpermute(y_RD, self._by_slot)
        rows_MD = self._context.exchange_rows(arrived_RD, self._rank_plan.receive_splits, self._rank_plan.send_splits)
        return combine(rows_MD, self._weights_TK, self._by_pair)

    def _received_counts(self) -> Tensor:
        """[W, d] int64: rows from each source for each expert of this rank."""
        placement, rank = self._plan.placement, self._context.rank
        counts_P = self._by_pair.counts_G.to(torch.int64)
        if self._plan.num_dropped_tokens == 0:
            return torch.from_numpy(self._rank_plan.received_Wd).to(counts_P.device)
        # How many assignments each expert lost depends on the scores, which only the sources know.
        num_pairs_W = placement.num_pairs_W.tolist()
        num_local = num_pairs_W[rank]
        counts = self._context.exchange_rows(counts_P, num_pairs_W, [num_local] * placement.world_size)
        return counts.view(placement.world_size, num_local)
