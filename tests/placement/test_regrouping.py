"""Segments of sorted rows in another order, with literals."""

from __future__ import annotations

import numpy as np

from swiftmoe_lightning.placement import Placement, RankPlan, Regrouping, regroup_received, regroup_sent


def lists(regrouping: Regrouping) -> list[list[int]]:
    assert all(table.dtype == np.int32 for table in regrouping.tables)
    return [table.tolist() for table in regrouping.tables]


def plan(sent_P: list[int], received_Wd: list[list[int]]) -> RankPlan:
    return RankPlan(np.array(sent_P), np.array([]), np.array(received_Wd), [], [])


def test_segments_move_to_their_places() -> None:
    regrouping = Regrouping.of(np.array([3, 1, 2]), np.array([1, 2, 0]), np.array([2, 4]))
    assert lists(regrouping) == [[3, 4, 6], [2, 2, -4], [2, 4], [2, 6]]


def test_what_an_expert_sends_is_cut_by_ranks() -> None:
    # Rank 0 has experts 0 and 1, rank 1 experts 0 and 2. By expert: e0 r0, e0 r1, e1 r0, e2 r1.
    placement = Placement(np.array([0, 1, 0, 2]), 3, 2)
    sent = regroup_sent(plan([4, 1, 2, 5], []), placement)
    # By expert: 4, 2, 1 and 5 rows; by rank e0 and e1, then e0 and e2: the second and third swap.
    assert lists(sent) == [[4, 6, 7, 12], [0, 1, -2, 0], [4, 1, 2, 5], [4, 5, 7, 12]]


def test_what_a_rank_receives_is_gathered_by_slot() -> None:
    # Rank 0 has expert 1 twice, in slots 0 and 2, of which one gets all rows.
    placement = Placement(np.array([1, 0, 1, 0, 1, 2]), 3, 2)
    received = regroup_received(plan([], [[3, 1], [0, 2]]), placement)
    # As they come: 3 of e0 and 1 of e1 from rank 0, 0 of e0 and 2 of e1 from rank 1.
    assert lists(received) == [[3, 4, 4, 6], [0, 0, -1, 0], [3, 3, 0], [3, 6, 6]]
