"""What a change of placement leaves to do for weights that have not changed."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import Placement, arriving_indices, node_arrivals, node_placements, plan_moves
from tests.placement.cases import placements

# Rank 0 has experts 1, 2, 5 and 6, then 2, 3, 5 and 6: 2 moves down, 5 and 6 stay, 3 arrives between them.
BEFORE = Placement([1, 2, 5, 6, 0, 3, 4, 4], 7, 2)
LATER = Placement([2, 3, 5, 6, 0, 1, 4, 4], 7, 2)


def test_literal_arrivals_and_moves() -> None:
    assert BEFORE.arrivals(LATER).tolist() == [False, True, False, False, False, True, False]
    assert plan_moves(BEFORE, LATER, 0) == [(1, 0)]
    # Expert 1 arrives where 3 was, and 4 stays.
    assert plan_moves(BEFORE, LATER, 1) == []
    assert [arriving_indices(LATER, rank, BEFORE.arrivals(LATER)).tolist() for rank in (0, 1)] == [[1], [1]]
    assert arriving_indices(LATER, 0, None).tolist() == [0, 1, 2, 3]


def test_moves_down_go_lowest_first_and_moves_up_highest_first() -> None:
    before, later = Placement([0, 2, 3, 6, 7, 1, 4, 5, 8, 8], 9, 2), Placement([2, 3, 5, 6, 7, 0, 1, 4, 8, 8], 9, 2)
    assert plan_moves(before, later, 0) == [(1, 0), (2, 1)]
    # The second rank: 1, 4, 5, 8 -> 0, 1, 4, 8.
    assert plan_moves(before, later, 1) == [(1, 2), (0, 1)]


def test_literal_arrivals_at_two_levels() -> None:
    # 2 nodes of 2 ranks. Expert 1 comes to rank 0, whose neighbour has it; 0 to rank 3, whose node does not.
    before = Placement([0, 0, 0, 1, 2, 2, 2, 2], 3, 4)
    later = Placement([0, 1, 0, 1, 2, 2, 2, 0], 3, 4)
    arrives_P = before.arrivals(later)
    assert arrives_P.tolist() == [False, True, False, False, False, True, False]
    between, inside = node_arrivals(arrives_P, later, 0, 2)
    assert between.tolist() == [False, True, True, False]
    assert inside.tolist() == [False, True, False, False]
    assert node_arrivals(arrives_P, later, 3, 2)[1].tolist() == [False, True, False]


@given(st.integers(1, 4), st.integers(1, 6), st.data())
@settings(max_examples=100, deadline=None)
def test_moves_and_arrivals_make_the_later_slots_of_the_earlier(
    world_size: int, num_experts: int, data: st.DataObject
) -> None:
    before, later = (data.draw(placements(world_size=world_size, num_experts=num_experts)) for _ in range(2))
    arrives_P = before.arrivals(later)
    assert arrives_P.sum() == before.num_moved(later)
    for rank in range(world_size):
        # Room for either.
        slots = np.full(num_experts, -1)
        slots[: before.num_pairs_W[rank]] = before.experts_of(rank)
        for old, new in plan_moves(before, later, rank):
            slots[new] = slots[old]
        experts_d = later.experts_of(rank)
        arriving = arriving_indices(later, rank, arrives_P)
        assert np.isin(experts_d[arriving], before.experts_of(rank)).sum() == 0
        slots[arriving] = experts_d[arriving]
        assert slots[: len(experts_d)].tolist() == experts_d.tolist()


@given(st.integers(1, 3), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_what_arrives_at_a_rank_arrives_at_its_node(num_nodes: int, size: int, data: st.DataObject) -> None:
    before, later = (data.draw(placements(world_size=num_nodes * size, num_experts=5)) for _ in range(2))
    arrives_P = before.arrivals(later)
    for rank in range(num_nodes * size):
        nodes, inside = node_placements(later, rank, size)
        between, within = node_arrivals(arrives_P, later, rank, size)
        node, number = divmod(rank, size)
        at_node = nodes.experts_of(node)[arriving_indices(nodes, node, between)]
        expected = arriving_indices(later, rank, arrives_P)
        assert arriving_indices(inside, number, within).tolist() == expected.tolist()
        assert np.isin(later.experts_of(rank)[expected], at_node).all()
        ranks = range(node * size, (node + 1) * size)
        anywhere = {int(e) for r in ranks for e in later.experts_of(r)[arriving_indices(later, r, arrives_P)]}
        assert set(at_node.tolist()) == anywhere
