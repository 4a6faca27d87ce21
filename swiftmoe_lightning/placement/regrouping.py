"""Sorted rows in another order of their segments, so that what is sorted by one key need not be sorted by the next.

A segment is a run of neighbouring rows. W ranks, P (rank, expert) pairs, d pairs of one rank, s slots of one rank,
V segments, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.token_split import RankPlan


@dataclass(frozen=True, eq=False)
class Regrouping:
    """Where the rows of each segment go.

        segment                  0       1       2
        as they lie            a a a     b      c c        ends_V    3   4   6
        places 1, 2, 0         c c    a a a      b         shifts_V  2   2  -4

    Attributes:
        ends_V: [V] int32, the end of each segment, as they lie.
        shifts_V: [V] int32, by how many rows each moves.
        counts_G: [G] int32, rows of each group in the new order.
        ends_G: [G] int32, the end of each group's rows there.
    """

    ends_V: np.ndarray
    shifts_V: np.ndarray
    counts_G: np.ndarray
    ends_G: np.ndarray

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """All four, in this order."""
        return self.ends_V, self.shifts_V, self.counts_G, self.ends_G

    @classmethod
    def of(cls, sizes_V: np.ndarray, place_V: np.ndarray, counts_G: np.ndarray) -> Regrouping:
        """Move segments to other places.

        Args:
            sizes_V: [V] rows of each.
            place_V: [V], how many segments are before each in the new order: a permutation of 0..V-1.
            counts_G: [G] rows of each group in the new order; neighbouring segments are one group.
        """
        ends_V = sizes_V.cumsum()
        moved_V = np.empty_like(sizes_V)
        moved_V[place_V] = sizes_V
        shifts_V = moved_V.cumsum()[place_V] - ends_V
        return cls(*(table.astype(np.int32) for table in (ends_V, shifts_V, counts_G, counts_G.cumsum())))


def regroup_sent(rank_plan: RankPlan, placement: Placement) -> Regrouping:
    """Assignments by expert -> by (rank, expert) pair, where nothing is dropped. Segments and groups are the pairs."""
    by_expert_P = placement.by_expert_P
    return Regrouping.of(rank_plan.sent_P[by_expert_P], by_expert_P, rank_plan.sent_P)


def regroup_received(rank_plan: RankPlan, placement: Placement) -> Regrouping:
    """Rows by source, and of each source by expert -> by slot, where nothing is dropped.

    Slots that only repeat an expert of their rank get no rows.
    """
    received_Wd = rank_plan.received_Wd
    place_Wd = np.arange(received_Wd.size).reshape(received_Wd.shape[::-1]).T
    counts_s = np.zeros(placement.slots_per_rank, np.int64)
    counts_s[: received_Wd.shape[1]] = received_Wd.sum(0)
    return Regrouping.of(received_Wd.flatten(), place_Wd.flatten(), counts_s)
