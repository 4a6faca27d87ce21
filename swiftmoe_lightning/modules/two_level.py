"""Carries out this rank's part of a `NodePlan`: a token travels once to each node that has one of its experts.

W ranks, G nodes of n ranks, P (rank, expert) pairs, d experts of this rank, T tokens, D model dim, K top-k, R rows that
this rank computes. M: (token, node) rows that this rank sends; m: those that it gets as a relay.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.distributed import NodeGroups, packed_bytes, returned_dtype, to_device, to_host
from swiftmoe_lightning.modules.context import ExpertParallelContext
from swiftmoe_lightning.modules.dispatch import TokenDispatcher, mark_rows, sort_by_slot
from swiftmoe_lightning.ops import SortedAssignments, combine, permute, sort_assignments
from swiftmoe_lightning.placement import DispatchPlan, NodePlan, Placement


def make_dispatcher(
    context: ExpertParallelContext,
    plan: DispatchPlan,
    by_expert: SortedAssignments,
    weights_TK: Tensor,
    popularity_E: np.ndarray,
    x_TD: Tensor,
) -> TokenDispatcher | TwoLevelDispatcher:
    """The dispatcher of one forward, of the same class on all ranks. A collective where the context has `nodes`.

    Args:
        context: exchanges the rows.
        plan: what all ranks send and drop.
        by_expert: this rank's assignments, sorted by expert.
        weights_TK: [T, K] floating, the router's scores of the assignments.
        popularity_E: [E] int64, assignments of all ranks to each expert.
        x_TD: [T, D], the tokens, of which only width and dtype are looked at.
    """
    flat = TokenDispatcher(context, plan, by_expert, weights_TK, popularity_E)
    if context.nodes is not None:
        nodes = context.nodes
        tokens = NodeTokens(flat.by_pair, weights_TK, plan.placement, nodes, x_TD.dtype)
        there_and_back = (context.token_dtype, returned_dtype(context.token_dtype))
        row_bytes = sum(packed_bytes(x_TD.shape[1], x_TD.dtype, dtype) for dtype in there_and_back)
        if tokens.node_plan.pays(row_bytes, tokens.label_bytes, nodes.speed_ratio):
            return TwoLevelDispatcher(context, nodes, tokens, flat.popularity_E, x_TD.dtype)
        if tokens.weights_TK.shape[1] == 1 and tokens.node_plan.num_assignments:
            # With one expert a token there is nothing to save, now or later: the layer gathers no more.
            context.nodes = None
    return flat


class NodeTokens:
    """This rank's tokens by the nodes that they go to, and what all ranks send to which node. A collective.

    Args:
        by_pair: the assignments that this rank sends, sorted by pair.
        weights_TK: [T, K] floating, the weight of each assignment in its token's sum.
        placement: which ranks have which expert.
        nodes: the groups.
        dtype: of the rows.

    Attributes:
        node_plan: what all ranks send.
        weights_TK: [T, K] as they travel.
        label_bytes: of a token's pairs and weights, which it takes along to another node.
    """

    def __init__(
        self,
        by_pair: SortedAssignments,
        weights_TK: Tensor,
        placement: Placement,
        nodes: NodeGroups,
        dtype: torch.dtype,
    ) -> None:
        device, num_pairs, num_nodes = weights_TK.device, placement.num_pairs, nodes.rail.size
        first_G = placement.first_pair_W[:: nodes.node.size]
        self._first_G, self._end_G = to_device(device, first_G, np.append(first_G[1:], num_pairs))
        assignment_N = by_pair.assignment_R.to(torch.int64)
        pair_N = torch.arange(num_pairs, device=device)
        pair_N = pair_N.repeat_interleave(by_pair.counts_G, output_size=len(assignment_N))
        self._pair_TK = torch.full(weights_TK.shape, -1, device=device)
        self._pair_TK.view(-1)[assignment_N] = pair_N
        node_TK = torch.bucketize(self._pair_TK, self._end_G, right=True)
        node_TK = torch.where(self._pair_TK < 0, num_nodes, node_TK)
        has_TG = torch.zeros(len(node_TK), num_nodes + 1, dtype=torch.bool, device=device).scatter_(1, node_TK, True)
        node_TG = torch.where(has_TG[:, :-1], torch.arange(num_nodes, device=device), -1)
        self._by_node = sort_assignments(node_TG, num_nodes)

        num_choices = by_pair.counts_G.new_full((1,), weights_TK.shape[1])
        row = torch.cat([num_choices, self._by_node.counts_G, by_pair.counts_G])
        table = to_host(nodes.everyone.all_gather(row)).astype(np.int64)
        self.node_plan = NodePlan(table[:, 1 : 1 + num_nodes], table[:, 1 + num_nodes :], placement, nodes.node.size)
        # A rank that evaluates nothing, and serves others, knows neither K nor the dtype of their weights.
        missing = int(table[:, 0].max()) - weights_TK.shape[1]
        self._pair_TK = F.pad(self._pair_TK, (0, missing), value=-1)
        self.weights_TK = F.pad(weights_TK, (0, missing)).to(torch.promote_types(dtype, torch.float32))
        self.label_bytes = (4 + self.weights_TK.element_size()) * self.weights_TK.shape[1]

    def by_node(self, num_rows: int) -> SortedAssignments:
        """The M rows that this rank sends, by node, then token. Row t * G + v is token t's for node v.

        Args:
            num_rows: M.
        """
        return self._by_node._replace(assignment_R=self._by_node.assignment_R[:num_rows])

    def pairs(self, by_node: SortedAssignments) -> Tensor:
        """[M, K] int32: each row's pairs on its node, counted from the node's first one; -1 for those elsewhere."""
        row_M = by_node.assignment_R.to(torch.int64)
        num_nodes = len(self._first_G)
        node_M1, pair_MK = (row_M % num_nodes).unsqueeze(1), self._pair_TK[row_M // num_nodes]
        is_there_MK = (pair_MK >= self._first_G[node_M1]) & (pair_MK < self._end_G[node_M1])
        return torch.where(is_there_MK, pair_MK - self._first_G[node_M1], -1).to(torch.int32)


class TwoLevelDispatcher:
    """Sends one forward's tokens to their nodes and on to their experts' ranks, and the results back.

    Used as a `TokenDispatcher`; but a row is of a token and a node, and rows that come back are summed as they are.

    Args:
        context: the layer's; its placement is the plan's.
        nodes: the groups.
        tokens: this rank's, and what all ranks send.
        popularity_E: [E] int64, on the device.
        dtype: of the rows.

    Attributes:
        by_pair: the rows that this rank sends, sorted by node.
        weights_TK: [T, G] ones.
        popularity_E: on the device.
    """

    def __init__(
        self,
        context: ExpertParallelContext,
        nodes: NodeGroups,
        tokens: NodeTokens,
        popularity_E: Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._nodes, self._tokens, self._slots_per_rank = nodes, tokens, context.placement.slots_per_rank
        self._there, self._back = context.token_dtype, returned_dtype(context.token_dtype)
        self._plan = tokens.node_plan.for_rank(nodes.everyone.rank)
        self.by_pair = tokens.by_node(sum(self._plan.rail_send))
        rows_TG = self.by_pair.rows_TK
        self.weights_TK = torch.ones(rows_TG.shape, dtype=dtype, device=rows_TG.device)
        self.popularity_E = popularity_E
        mark_rows(self.by_pair.assignment_R)

    @torch.compiler.disable
    def dispatch(self, rows_MD: Tensor) -> tuple[Tensor, SortedAssignments]:
        """[M, D] rows of `by_pair` -> ([R, D] rows as they arrived, the same sorted by the slots of this rank)."""
        plan = self._plan
        x_mD = self._to_relays(rows_MD, self._there)
        self._weights_mK = self._to_relays(permute(self._tokens.weights_TK, self.by_pair))
        pairs_mK = self._to_relays(self._tokens.pairs(self.by_pair))
        # From here on the relay does with its node's pairs what one exchange does with all pairs.
        relayed = sort_assignments(pairs_mK, plan.pairs.stop - plan.pairs.start)
        self._relayed = relayed._replace(assignment_R=relayed.assignment_R[: sum(plan.node_send)])
        rows_ND = permute(x_mD, self._relayed)
        arrived_RD = self._nodes.node.exchange_rows(rows_ND, plan.node_send, plan.node_receive, self._there)
        (counts_V,) = to_device(rows_MD.device, plan.received_nd.reshape(-1))
        by_slot = sort_by_slot(counts_V, self._nodes.node.size, len(arrived_RD), self._slots_per_rank)
        mark_rows(arrived_RD, by_slot.assignment_R, by_slot.rows_TK)
        return arrived_RD, by_slot

    @torch.compiler.disable
    def combine(self, arrived_RD: Tensor) -> Tensor:
        """[R, D] results in the order in which rows arrived -> [M, D], for each row the weighted sum of its node."""
        plan = self._plan
        rows_ND = self._nodes.node.exchange_rows(arrived_RD, plan.node_receive, plan.node_send, self._back)
        sums_mD = combine(rows_ND, self._weights_mK, self._relayed)
        sums_MD = self._nodes.rail.exchange_rows(sums_mD, plan.rail_receive, plan.rail_send, self._back)
        mark_rows(sums_MD)
        return sums_MD

    def _to_relays(self, rows_M: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self._nodes.rail.exchange_rows(rows_M, self._plan.rail_send, self._plan.rail_receive, dtype)
