"""Carries out this rank's part of a `DispatchPlan`: sends tokens to their experts' ranks, and the results back.

W ranks, B budgets, P (rank, expert) pairs, d experts of this rank, E experts, T tokens, D model dim, K top-k,
N = T * K assignments, R rows received. M: rows sent, this rank's assignments that survive.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import returned_dtype, to_device
from swiftmoe_lightning.modules.context import ExpertParallelContext
from swiftmoe_lightning.ops import SortedAssignments, regroup, sort_assignments
from swiftmoe_lightning.placement import DispatchPlan, RankPlan, regroup_received, regroup_sent


def sorting_tables(plan: DispatchPlan, rank_plan: RankPlan) -> tuple[np.ndarray, ...]:
    """What `sort_by_pair` needs on the device.

    Returns:
        Of the pairs in the order of their experts: which it is, what this rank sends to it, and its budget, [P] each;
        and how many of this rank's assignments survive in each budget, [B]. All int32.
    """
    order_P = plan.placement.by_expert_P
    tables = (order_P, rank_plan.sent_P[order_P], plan.budget_of_pair_P[order_P], rank_plan.kept_B)
    return tuple(table.astype(np.int32) for table in tables)


def sort_by_pair(
    by_expert: SortedAssignments, weights_TK: Tensor, rank_plan: RankPlan, tables: tuple[Tensor, ...]
) -> SortedAssignments:
    """Sort this rank's assignments by pair, and drop those over budget: in each budget the ones of lowest score.

    Args:
        by_expert: this rank's assignments, sorted by expert. Those of expert ids outside 0..E-1 have no row (Hugging
            Face marks experts of other ranks so).
        weights_TK: [T, K] floating, the router's scores of the assignments.
        rank_plan: what this rank sends and drops.
        tables: `sorting_tables` of the plan, on the device.

    Returns:
        The M rows that this rank sends, by (rank, expert) and then by token; none is unassigned.
    """
    order_P, sent_P, budget_P, kept_B = tables
    num_assigned, num_kept = int(rank_plan.sent_P.sum()), int(rank_plan.kept_B.sum())
    pair_N = order_P.repeat_interleave(sent_P, output_size=num_assigned)
    budget_N = budget_P.repeat_interleave(sent_P, output_size=num_assigned)
    assignment_N = by_expert.assignment_R[:num_assigned]
    order_N, is_kept_N = _best_first(weights_TK.detach().flatten()[assignment_N], budget_N, kept_B)
    pair_TK = torch.full(weights_TK.shape, -1, dtype=torch.int32, device=weights_TK.device)
    pair_TK.view(-1)[assignment_N[order_N]] = torch.where(is_kept_N, pair_N[order_N], -1)
    by_pair = sort_assignments(pair_TK, len(order_P))
    return by_pair._replace(assignment_R=by_pair.assignment_R[:num_kept])


def _best_first(score_N: Tensor, budget_N: Tensor, kept_B: Tensor) -> tuple[Tensor, Tensor]:
    """([N] assignments by budget and then by score, of equals the first; [N] bool, whether each of those survives)."""
    best_first_N = torch.argsort(score_N, descending=True, stable=True)
    order_N = best_first_N[torch.argsort(budget_N[best_first_N], stable=True)]
    budget_N = budget_N[order_N]
    sizes_B = torch.zeros_like(kept_B).scatter_add_(0, budget_N.to(torch.int64), torch.ones_like(budget_N))
    index_N = torch.arange(len(order_N), device=budget_N.device) - (sizes_B.cumsum(0) - sizes_B)[budget_N]
    return order_N, index_N < kept_B[budget_N]


class TokenDispatcher:
    """Sends one forward's tokens to their experts' ranks, and the results back.

    torch.compile traces none of it: splits are integers of the host, and change in every step. It compiles what is
    between its calls, for any number of rows.

    Args:
        context: exchanges the rows.
        plan: what all ranks send and drop.
        by_expert: this rank's assignments, sorted by expert.
        weights_TK: [T, K] floating, the router's scores of the assignments.
        popularity_E: [E] int64, assignments of all ranks to each expert.

    Attributes:
        by_pair: the rows that this rank sends, sorted by pair.
        weights_TK: what rows that come back are multiplied by.
        popularity_E: [E] int32, on the device.
    """

    def __init__(
        self,
        context: ExpertParallelContext,
        plan: DispatchPlan,
        by_expert: SortedAssignments,
        weights_TK: Tensor,
        popularity_E: np.ndarray,
    ) -> None:
        self._context, self._plan, self._rank_plan = context, plan, plan.for_rank(context.rank)
        self._by_slot: list[Tensor] = []
        self.weights_TK = weights_TK
        device, popularity_E = weights_TK.device, popularity_E.astype(np.int32)
        if plan.num_dropped_tokens:
            self.popularity_E, *tables = to_device(device, popularity_E, *sorting_tables(plan, self._rank_plan))
            self.by_pair = sort_by_pair(by_expert, weights_TK, self._rank_plan, tuple(tables))
        else:
            sent, received = (cut(self._rank_plan, plan.placement) for cut in (regroup_sent, regroup_received))
            self.popularity_E, *tables = to_device(device, popularity_E, *sent.tables, *received.tables)
            self.by_pair = _regroup(by_expert.rows_TK, sum(self._rank_plan.send_splits), tables[:4])
            self._by_slot = tables[4:]
        mark_rows(self.by_pair.assignment_R)

    def _start_counts(self) -> Callable[[], Tensor]:
        """Begin to exchange how many assignments of each expert survive.

        The scores decide it, which sources alone know.

        Returns:
            What waits for them: [W * d] int32, rows from each source for each expert of this rank.
        """
        num_pairs_W = self._plan.placement.num_pairs_W.tolist()
        own = [num_pairs_W[self._context.rank]] * len(num_pairs_W)
        return self._context.start_exchange(self.by_pair.counts_G, num_pairs_W, own)

    @torch.compiler.disable
    def dispatch(self, rows_MD: Tensor) -> tuple[Tensor, SortedAssignments]:
        """[M, D] rows of `by_pair` -> ([R, D] rows as they arrived, the same sorted by the slots of this rank)."""
        receive_counts = self._start_counts() if self._plan.num_dropped_tokens else None
        send, receive = self._rank_plan.send_splits, self._rank_plan.receive_splits
        arrived_RD = self._context.exchange_rows(rows_MD, send, receive, self._context.token_dtype)
        if receive_counts is None:
            row_R1 = torch.arange(len(arrived_RD), dtype=torch.int32, device=arrived_RD.device).unsqueeze(1)
            by_slot = _regroup(row_R1, len(arrived_RD), self._by_slot)
        else:
            placement, counts_V = self._plan.placement, receive_counts()
            by_slot = sort_by_slot(counts_V, placement.world_size, len(arrived_RD), placement.slots_per_rank)
        mark_rows(arrived_RD, by_slot.assignment_R, by_slot.rows_TK)
        return arrived_RD, by_slot

    @torch.compiler.disable
    def combine(self, arrived_RD: Tensor) -> Tensor:
        """[R, D] results in the order in which rows arrived -> [M, D] of the rows that were sent."""
        send, receive = self._rank_plan.send_splits, self._rank_plan.receive_splits
        rows_MD = self._context.exchange_rows(arrived_RD, receive, send, returned_dtype(self._context.token_dtype))
        mark_rows(rows_MD)
        return rows_MD


def sort_by_slot(counts_V: Tensor, num_sources: int, num_rows: int, slots_per_rank: int) -> SortedAssignments:
    """Sort the rows that have arrived by the slots of this rank. Slots that only repeat an expert of it get none.

    Args:
        counts_V: [sources * d] int, rows from each source for each expert of this rank.
        num_sources: that rows come from.
        num_rows: R, the sum of the counts.
        slots_per_rank: s.
    """
    expert_V = torch.arange(len(counts_V), device=counts_V.device) % (len(counts_V) // num_sources)
    expert_R = expert_V.repeat_interleave(counts_V, output_size=num_rows)
    return sort_assignments(expert_R.unsqueeze(1), slots_per_rank)


def _regroup(rows_TK: Tensor, num_rows: int, tables: list[Tensor]) -> SortedAssignments:
    """Sorted assignments in another order of their segments; tables: those of a `Regrouping`, on the device."""
    ends_V, shifts_V, counts_G, ends_G = tables
    return SortedAssignments(*regroup(rows_TK, ends_V, shifts_V, num_rows), counts_G, ends_G)


def mark_rows(*rows: Tensor) -> None:
    """Tell torch.compile that the first dim changes from step to step."""
    for tensor in rows:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
