"""Who sends which assignments, once each pair's share of its expert's load is known.

W ranks, E experts, P (rank, expert) pairs ordered by (rank, expert), d pairs of one rank, G nodes of n neighbouring
ranks, V lines.
"""

from __future__ import annotations

import numpy as np

from swiftmoe_lightning.placement.placement import Placement


class Routes:
    """Who sends what to whom, as prefix sums over source ranks.

    Three rounds, each of which shares out what the one before left: first every rank serves itself, then every node
    its ranks, then the rest is spread over all ranks. Inside a round the supplies of an expert's sources lie on one
    line, the open shares of its pairs on another, both in rank order, and each source sends to each pair as much as
    their intervals overlap:

        supplies of sources     |------- r0 4 ------|------------ r1 6 -----------|-- r2 2 -|
        open shares of pairs    |--------- r0 5 ---------|---- r2 3 ----|------- r3 4 ------|
        sent, 12 in all         |   r0 to r0: 4     | 1  |  r1 to r2: 3 | r1 to r3| r2 to r3|

    What the first sources send to a pair is the overlap of [0, the sum of their supplies) with the pair's interval. So
    a rank needs those sums at itself and its successor for all experts, and at all ranks for its own experts: it adds
    up the counts below it and takes d columns of them, but makes no table of [W, E].

    Args:
        counts_WE: [W, E] int64, assignments of each rank for each expert.
        placement: which ranks have which expert.
        share_P: [P] int64, assignments that go to each pair.
        ranks_per_node: neighbours on a node; 0 skips the first two rounds.
    """

    def __init__(self, counts_WE: np.ndarray, placement: Placement, share_P: np.ndarray, ranks_per_node: int) -> None:
        self._counts_WE, self._placement = counts_WE, placement
        # What every rank sends to itself in the first round.
        self._kept_P, open_P = np.zeros_like(share_P), share_P
        self._node: NodeRound | None = None
        if ranks_per_node:
            self._kept_P = np.minimum(counts_WE[placement.pair_rank_P, placement.pair_expert_P], share_P)
            open_P = share_P - self._kept_P
        if 1 < ranks_per_node < placement.world_size:
            self._node = NodeRound(counts_WE, placement, self._kept_P, open_P, ranks_per_node)
            open_P = open_P - self._node.taken_P
        order_P = placement.by_expert_P
        self._shares = Shares(open_P, order_P, placement.pair_expert_P[order_P], placement.first_pair_E)

    def sent_before(self, rank: int) -> np.ndarray:
        """[2, P] int64: what the sources below `rank` send to each pair, and what those up to `rank` do."""
        expert_P, own = self._placement.pair_expert_P, self._placement.pairs_of(rank, rank + 1)
        before_2P = np.zeros((2, len(expert_P)), dtype=np.int64)
        before_2P[0, : own.start] = self._kept_P[: own.start]
        before_2P[1, : own.stop] = self._kept_P[: own.stop]
        # What the node's sources below this rank have left, and those up to it; or the world's, where there is no node.
        first = 0 if self._node is None else self._node.first_rank(rank)
        below = self._placement.pairs_of(first, rank)
        supply_2E = np.empty((2, self._placement.num_experts), dtype=np.int64)
        self._counts_WE[first:rank].sum(0, out=supply_2E[0])
        np.subtract.at(supply_2E[0], expert_P[below], self._kept_P[below])
        np.add(supply_2E[0], self._counts_WE[rank], out=supply_2E[1])
        supply_2E[1, expert_P[own]] -= self._kept_P[own]
        if self._node is not None:
            supply_2E = self._node.send_row(rank, supply_2E, before_2P)
        before_2P += self._shares.overlap(supply_2E.take(expert_P, axis=1), slice(None))
        return before_2P

    def received_before(self, rank: int) -> np.ndarray:
        """[W + 1, d] int64: what the sources below each rank, and all of them, send to each of the pairs of `rank`."""
        placement, own = self._placement, self._placement.pairs_of(rank, rank + 1)
        experts_d = placement.pair_expert_P[own]
        column_E = np.full(placement.num_experts, -1)
        column_E[experts_d] = np.arange(len(experts_d))
        # All pairs of these experts, on whichever ranks they are.
        pairs = np.flatnonzero(column_E[placement.pair_expert_P] >= 0)
        ranks, columns = placement.pair_rank_P[pairs], column_E[placement.pair_expert_P[pairs]]
        supply_Wd = self._counts_WE.take(experts_d, axis=1)
        supply_Wd[ranks, columns] -= self._kept_P[pairs]
        before_Qd = np.zeros((placement.world_size + 1, len(experts_d)), dtype=np.int64)
        before_Qd[rank + 1 :] = self._kept_P[own]
        if self._node is None:
            supply_Wd.cumsum(0, out=supply_Wd)
        else:
            supply_Wd = self._node.send_column(rank, supply_Wd, (pairs, ranks, columns), before_Qd)
        before_Qd[1:] += self._shares.overlap(supply_Wd, own)
        return before_Qd


class Shares:
    """Intervals of the pairs' open shares, on a line for each expert, or for each expert and node.

    Where one begins is a sum over all pairs before it, less that sum at the first pair of its line:

        (expert, node)      e0 g0   e0 g0   e0 g1   e1 g0   e1 g0
        open share            5       3       4       2       6
        sum before            0       5       8      12      14
        begin                 0       5       0       0       2

    Args:
        open_P: [P] int64, what the pairs can still take.
        order_P: the pairs, line by line.
        line_P: [P] int64, the line of each in that order.
        first_V: [V] int64, where each line begins in that order.

    Attributes:
        open_P: [P] int64.
    """

    def __init__(self, open_P: np.ndarray, order_P: np.ndarray, line_P: np.ndarray, first_V: np.ndarray) -> None:
        ordered_P = open_P[order_P]
        before_P = ordered_P.cumsum() - ordered_P
        before_P -= before_P[first_V][line_P]
        self.open_P, self._begin_P = open_P, np.empty_like(before_P)
        self._begin_P[order_P] = before_P

    def overlap(self, supply_xp: np.ndarray, pairs: slice) -> np.ndarray:
        """How much of [0, supply) lies in the intervals of some pairs.

        Args:
            supply_xp: [..., p], for each of these pairs.
            pairs: which.
        """
        overlap_xp = supply_xp - self._begin_P[pairs]
        np.maximum(overlap_xp, 0, out=overlap_xp)
        return np.minimum(overlap_xp, self.open_P[pairs], out=overlap_xp)


class NodeRound:
    """The round in which nodes of neighbouring ranks serve themselves.

    A node's sources send as much of an expert as its pairs can take, the first ones first. So of what the first of them
    have, all that is above the node's open shares is left.

    Args:
        counts_WE: [W, E] int64, assignments of each rank for each expert.
        placement: which ranks have which expert.
        kept_P: [P] int64, what ranks sent to themselves before.
        open_P: [P] int64, what the pairs can still take.
        ranks_per_node: n; the last node may have fewer.

    Attributes:
        taken_P: [P] int64, what the round gives each pair.
    """

    def __init__(
        self, counts_WE: np.ndarray, placement: Placement, kept_P: np.ndarray, open_P: np.ndarray, ranks_per_node: int
    ) -> None:
        self._placement, self._ranks_per_node = placement, ranks_per_node
        order_P = placement.by_expert_P
        expert_P, node_P = placement.pair_expert_P[order_P], (placement.pair_rank_P // ranks_per_node)[order_P]
        is_first_P = np.ones(len(order_P), dtype=bool)
        is_first_P[1:] = (expert_P[1:] != expert_P[:-1]) | (node_P[1:] != node_P[:-1])
        line_P, first_V = is_first_P.cumsum() - 1, np.flatnonzero(is_first_P)
        self._shares = Shares(open_P, order_P, line_P, first_V)
        self._counts_GE = _sum_by_node(counts_WE, ranks_per_node)
        supply_V = self._counts_GE[node_P[first_V], expert_P[first_V]] - np.add.reduceat(kept_P[order_P], first_V)
        supply_P = np.empty_like(open_P)
        supply_P[order_P] = supply_V[line_P]
        self.taken_P = self._shares.overlap(supply_P, slice(None))
        self._served_P = kept_P + self.taken_P

    def first_rank(self, rank: int) -> int:
        """The first rank of the node of `rank`."""
        return rank // self._ranks_per_node * self._ranks_per_node

    def send_row(self, rank: int, supply_2E: np.ndarray, before_2P: np.ndarray) -> np.ndarray:
        """Add to the prefix sums of `Routes.sent_before` what this round sends.

        Args:
            rank: whose.
            supply_2E: [2, E] int64, what the node's sources below `rank`, and those up to it, have.
            before_2P: [2, P] int64, changed in place.

        Returns:
            [2, E] int64: what all sources below `rank`, and all up to it, have left.
        """
        expert_P, first = self._placement.pair_expert_P, self.first_rank(rank)
        below, node = self._placement.pairs_of(0, first), self._placement.pairs_of(first, first + self._ranks_per_node)
        before_2P[:, below] += self.taken_P[below]
        before_2P[:, node] += self._shares.overlap(supply_2E.take(expert_P[node], axis=1), node)
        open_E, left_E = np.zeros_like(supply_2E[0]), self._counts_GE[: first // self._ranks_per_node].sum(0)
        np.add.at(open_E, expert_P[node], self._shares.open_P[node])
        np.subtract.at(left_E, expert_P[below], self._served_P[below])
        return np.maximum(supply_2E - open_E, 0) + left_E

    def send_column(
        self, rank: int, supply_Wd: np.ndarray, pairs: tuple[np.ndarray, np.ndarray, np.ndarray], before_Qd: np.ndarray
    ) -> np.ndarray:
        """Add to the prefix sums of `Routes.received_before` what this round sends.

        Args:
            rank: whose.
            supply_Wd: [W, d] int64, what the sources have of each of its experts.
            pairs: all pairs of these experts: their indices, ranks, and experts as indices into d.
            before_Qd: [W + 1, d] int64, changed in place.

        Returns:
            [W, d] int64: what the sources up to each rank have left.
        """
        num_ranks, num_columns = supply_Wd.shape
        size, first = self._ranks_per_node, self.first_rank(rank)
        supply_Gnd = np.zeros((-(-num_ranks // size), size, num_columns), dtype=np.int64)
        supply_Gnd.reshape(-1, num_columns)[:num_ranks] = supply_Wd
        supply_Gnd.cumsum(1, out=supply_Gnd)
        sent_nd = self._shares.overlap(supply_Gnd[first // size], self._placement.pairs_of(rank, rank + 1))
        before_Qd[first + 1 : first + 1 + size] += sent_nd[: num_ranks - first]
        before_Qd[first + 1 + size :] += sent_nd[-1]
        open_Gd = np.zeros((len(supply_Gnd), num_columns), dtype=np.int64)
        indices, ranks, columns = pairs
        np.add.at(open_Gd.reshape(-1), ranks // size * num_columns + columns, self._shares.open_P[indices])
        left_Gnd = np.maximum(supply_Gnd - open_Gd[:, None], 0)
        left_Gnd[1:] += left_Gnd[:-1, -1].cumsum(0)[:, None]
        return left_Gnd.reshape(-1, num_columns)[:num_ranks]


def _sum_by_node(counts_WE: np.ndarray, ranks_per_node: int) -> np.ndarray:
    """[W, E] -> [G, E], of which the last node may have fewer ranks. (`reduceat` is several times as slow.)"""
    num_ranks, num_experts = counts_WE.shape
    whole = num_ranks // ranks_per_node * ranks_per_node
    counts_GE = counts_WE[:whole].reshape(-1, ranks_per_node, num_experts).sum(1)
    return counts_GE if whole == num_ranks else np.vstack([counts_GE, counts_WE[whole:].sum(0)])
