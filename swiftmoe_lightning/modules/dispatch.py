"""This rank's part of a `DispatchPlan`: which choice travels in which row, and the way there and back.

W ranks, B budgets, P (rank, expert) pairs, d experts of this rank, T tokens, D model dim, K top-k, N = T * K choices,
 R rows sent, M rows received.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.modules.context import ExpertParallelContext
from swiftmoe_lightning.ops import SortedChoices, combine, permute, sort_choices
from swiftmoe_lightning.placement import DispatchPlan, RankPlan


@dataclass(frozen=True, eq=False)
class SourceRows:
    """The rows this rank sends, ordered by (rank, expert) that they go to, inside that by token.

    Attributes:
        choice_R: [R] int32, the choice t * K + k in each row.
        rows_TK: [T, K] int32, its inverse, -1 where dropped.
        counts_P: [P] int64, rows for each pair.
    """

    choice_R: Tensor
    rows_TK: Tensor
    counts_P: Tensor


def choose_rows(by_expert: SortedChoices, weights_TK: Tensor, plan: DispatchPlan, side: RankPlan) -> SourceRows:
    """Which of this rank's choices go to which rank, and which are dropped: in each budget the lowest scores.

    Args:
        by_expert: this rank's choices, sorted by expert. Those of expert ids outside 0..E-1 are unassigned: they get
            no row (Hugging Face marks foreign experts so).
        weights_TK: [T, K] floating, the router's scores of the choices.
        plan: what all ranks send and drop.
        side: this rank's part of it.
    """
    device = weights_TK.device
    order_P = plan.placement.by_expert_P
    sent_P = side.sent_P[order_P]
    assigned = torch.from_numpy(sent_P).to(device)
    num_assigned = int(sent_P.sum())
    pair_N = torch.from_numpy(order_P).to(device).repeat_interleave(assigned, output_size=num_assigned)
    choice_N = by_expert.choice_N[:num_assigned]
    if plan.num_dropped_tokens:
        kept_N = _keep_best(weights_TK.detach().flatten()[choice_N], pair_N, plan.budget_of_pair_P, side.kept_B)
        choice_N, pair_N = choice_N[kept_N], pair_N[kept_N]
    choice_R = choice_N[sort_choices(pair_N, len(order_P)).choice_N]
    rows_TK = torch.full_like(weights_TK, -1, dtype=torch.int32)
    rows_TK.view(-1)[choice_R] = torch.arange(len(choice_R), device=device, dtype=torch.int32)
    counts_P = _count(pair_N, len(order_P))
    return SourceRows(choice_R, rows_TK, counts_P)


def _keep_best(score_N: Tensor, pair_N: Tensor, budget_of_pair_P: np.ndarray, kept_B: np.ndarray) -> Tensor:
    """Ascending places, in N, of the choices that survive: in each budget the best scores, ties to the earlier one."""
    budget_N = torch.from_numpy(budget_of_pair_P).to(pair_N.device)[pair_N]
    best_first_N = torch.argsort(score_N, descending=True, stable=True)
    order_N = best_first_N[torch.argsort(budget_N[best_first_N], stable=True)]
    budget_N = budget_N[order_N]
    sizes_B = _count(budget_N, len(kept_B))
    place_N = torch.arange(len(order_N), device=pair_N.device) - (sizes_B.cumsum(0) - sizes_B)[budget_N]
    return order_N[place_N < torch.from_numpy(kept_B).to(place_N.device)[budget_N]].sort().values


def _count(group_N: Tensor, num_groups: int) -> Tensor:
    """[num_groups] int64: how often each group occurs. (`bincount` would wait for a GPU.)"""
    counts = torch.zeros(num_groups, dtype=torch.int64, device=group_N.device)
    return counts.scatter_add_(0, group_N, torch.ones_like(group_N))


class TokenDispatcher:
    """The way of one forward's tokens to their experts' ranks and back.

    Args:
        context: what carries the rows.
        plan: what all ranks send and drop.
        side: this rank's part of it.
        source: the rows this rank sends.
    """

    def __init__(self, context: ExpertParallelContext, plan: DispatchPlan, side: RankPlan, source: SourceRows) -> None:
        self._context, self._plan, self._side, self._source = context, plan, side, source

    def dispatch(self, x_TD: Tensor) -> tuple[Tensor, SortedChoices]:
        """[T, D] -> ([M, D] rows as they arrived, their order by the slots of this rank)."""
        rows_RD = permute(x_TD, self._source.choice_R, self._source.rows_TK)
        arrived_MD = self._context.exchange_rows(rows_RD, self._side.send_splits, self._side.receive_splits)
        counts_Wd = self._received_counts()
        num_local = counts_Wd.shape[1]
        expert_M = torch.arange(num_local, device=x_TD.device).repeat(len(counts_Wd))
        expert_M = expert_M.repeat_interleave(counts_Wd.flatten(), output_size=len(arrived_MD))
        # Slots that hold no expert of their own come out as empty ones.
        self._order = sort_choices(expert_M, self._plan.placement.slots_per_rank)
        return arrived_MD, self._order

    def combine(self, y_MD: Tensor, weights_TK: Tensor) -> Tensor:
        """[M, D] expert outputs, by slot -> [T, D], each token's own weighted sum; a dropped choice adds zero.

        Args:
            y_MD: one for each row that `dispatch` gave, in the order by slots that came with them.
            weights_TK: [T, K], what each choice counts in the token's sum.
        """
        arrived_MD = permute(y_MD, self._order.row_N, self._order.choice_N.unsqueeze(1))
        rows_RD = self._context.exchange_rows(arrived_MD, self._side.receive_splits, self._side.send_splits)
        return combine(rows_RD, weights_TK, self._source.choice_R, self._source.rows_TK)

    def _received_counts(self) -> Tensor:
        """[W, d] int64: rows from each source for each expert of this rank."""
        placement, rank = self._plan.placement, self._context.rank
        counts_P = self._source.counts_P
        if self._plan.num_dropped_tokens == 0:
            return torch.from_numpy(self._side.received_Wd).to(counts_P.device)
        # Which experts lost how much depends on the scores, which only the sources know.
        num_pairs_W = placement.num_pairs_W.tolist()
        num_local = num_pairs_W[rank]
        counts = self._context.exchange_rows(counts_P, num_pairs_W, [num_local] * placement.world_size)
        return counts.view(placement.world_size, num_local)
