"""The plain version of `placement/routes.py`, and what that is timed against: the same rounds on tables of all ranks.

W ranks, E experts, P (rank, expert) pairs, Q queries of a prefix sum over source ranks.
"""

from __future__ import annotations

import numpy as np

from swiftmoe_lightning.placement import Placement


class WholeTables:
    """`Routes` from prefix sums of the counts in whole [W + 1, E] tables, one for each round.

    Args:
        counts_WE: [W, E] int64, assignments of each rank for each expert.
        placement: which ranks have which expert.
        share_P: [P] int64, assignments that go to each pair.
        ranks_per_node: neighbours on a node; 0 skips the first two rounds.
    """

    def __init__(self, counts_WE: np.ndarray, placement: Placement, share_P: np.ndarray, ranks_per_node: int) -> None:
        order_P = placement.by_expert_P
        self._num_ranks = placement.world_size
        self._rank_P, self._expert_P = placement.pair_rank_P, placement.pair_expert_P
        supply_WE, open_P = counts_WE, share_P
        self._self_P: np.ndarray | None = None
        self._node: Round | None = None
        if ranks_per_node:
            self._self_P = np.minimum(counts_WE[self._rank_P, self._expert_P], share_P)
            supply_WE = counts_WE.copy()
            supply_WE[self._rank_P, self._expert_P] -= self._self_P
            open_P = share_P - self._self_P
        if 1 < ranks_per_node < placement.world_size:
            self._node = Round(supply_WE, open_P, placement, order_P, ranks_per_node)
            supply_WE = self._node.supply_left_WE
            open_P = open_P - self._node.taken_P
        self._world = Round(supply_WE, open_P, placement, order_P, placement.world_size)

    def sent_before(self, rank: int) -> np.ndarray:
        """As of `Routes`."""
        return self.before(np.array([rank, rank + 1]), np.arange(len(self._rank_P)))

    def received_before(self, rank: int) -> np.ndarray:
        """As of `Routes`."""
        return self.before(np.arange(self._num_ranks + 1), np.flatnonzero(self._rank_P == rank))

    def before(self, ranks_Q: np.ndarray, pairs_P: np.ndarray) -> np.ndarray:
        """Prefix sums, over the sources, of what they send to each pair.

        Args:
            ranks_Q: [Q] ranks, 0..W.
            pairs_P: indices of the pairs to answer for, all of them or some.

        Returns:
            [Q, P] int64, what the sources below rank ranks_Q[q] send to pair pairs_P[p].
        """
        total_QP = self._world.before(ranks_Q, pairs_P)
        if self._node is not None:
            total_QP = total_QP + self._node.before(ranks_Q, pairs_P)
        if self._self_P is not None:
            total_QP = total_QP + self._self_P[pairs_P] * (ranks_Q[:, None] > self._rank_P[pairs_P])
        return total_QP


class Round:
    """One round, in which groups of `group_size` neighbouring ranks serve themselves.

    Args:
        supply_WE: [W, E] int64, what the sources still have.
        open_P: [P] int64, what the pairs can still take.
        placement: which ranks have which expert.
        order_P: the pairs by (expert, rank).
        group_size: ranks of a group.
    """

    def __init__(
        self, supply_WE: np.ndarray, open_P: np.ndarray, placement: Placement, order_P: np.ndarray, group_size: int
    ) -> None:
        self._supply_WE, self._open_P, self._expert_P = supply_WE, open_P, placement.pair_expert_P
        self._first_P = placement.pair_rank_P // group_size * group_size
        self._last_P = np.minimum(self._first_P + group_size, placement.world_size)
        # [W + 1, E]: supplies of the sources below each rank, and of all.
        self._supply_before_QE = np.zeros((len(supply_WE) + 1, supply_WE.shape[1]), dtype=np.int64)
        np.cumsum(supply_WE, axis=0, out=self._supply_before_QE[1:])
        # Where each pair's open share begins on the line of its expert and group: a sum over all pairs before it, less
        # that sum at the first pair of its line.
        #     (expert, group)    e0 g0   e0 g0   e0 g1   e1 g0   e1 g0
        #     open share           5       3       4       2       6
        #     sum before           0       5       8      12      14
        #     begin                0       5       0       0       2
        ordered_P = open_P[order_P]
        begin_P = np.cumsum(ordered_P) - ordered_P
        expert_P, group_P = self._expert_P[order_P], self._first_P[order_P]
        is_first_P = np.r_[True, (expert_P[1:] != expert_P[:-1]) | (group_P[1:] != group_P[:-1])]
        begin_P -= begin_P[np.maximum.accumulate(np.where(is_first_P, np.arange(len(begin_P)), 0))]
        self._begin_P = np.empty_like(begin_P)
        self._begin_P[order_P] = begin_P
        self._group_size = group_size

    def before(self, ranks_Q: np.ndarray, pairs_P: np.ndarray) -> np.ndarray:
        """[Q, P]: see `WholeTables.before`, in this round alone."""
        first_P, expert_P = self._first_P[pairs_P], self._expert_P[pairs_P]
        ranks_QP = np.clip(ranks_Q[:, None], first_P, self._last_P[pairs_P])
        supply_QP = self._supply_before_QE[ranks_QP, expert_P] - self._supply_before_QE[first_P, expert_P]
        return np.clip(supply_QP - self._begin_P[pairs_P], 0, self._open_P[pairs_P])

    @property
    def taken_P(self) -> np.ndarray:
        """[P]: what the round gives each pair."""
        supply_P = (
            self._supply_before_QE[self._last_P, self._expert_P] - self._supply_before_QE[self._first_P, self._expert_P]
        )
        return np.clip(supply_P - self._begin_P, 0, self._open_P)

    @property
    def supply_left_WE(self) -> np.ndarray:
        """[W, E]: what the sources still have after the round."""
        num_ranks = len(self._supply_WE)
        first_W = np.arange(num_ranks) // self._group_size * self._group_size
        num_groups = -(-num_ranks // self._group_size)
        open_GE = np.zeros((num_groups, self._supply_WE.shape[1]), dtype=np.int64)
        np.add.at(open_GE, (self._first_P // self._group_size, self._expert_P), self._open_P)
        open_WE = open_GE[first_W // self._group_size]
        start_WE = self._supply_before_QE[:-1] - self._supply_before_QE[first_W]
        sent_WE = np.minimum(start_WE + self._supply_WE, open_WE) - np.minimum(start_WE, open_WE)
        return self._supply_WE - sent_WE
