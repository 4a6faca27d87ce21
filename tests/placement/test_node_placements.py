"""Placements at two levels: literal ones, and what they send between nodes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import Placement, node_placements, plan_collection
from tests.placement.cases import placements

# 2 nodes of 2 ranks: expert 0 on ranks 0, 1 and 3, expert 1 on rank 1, expert 2 on ranks 2 and 3.
PLACEMENT = Placement([0, 0, 0, 1, 2, 2, 2, 0], 3, 4)


def test_literal_placements() -> None:
    nodes, inside = node_placements(PLACEMENT, rank=1, ranks_per_node=2)
    # Node 0 has experts 0 and 1, node 1 has 0 and 2.
    assert (nodes.world_size, nodes.pair_expert_P.tolist()) == (2, [0, 1, 0, 2])
    assert inside.table_Ws.tolist() == [[0, 0], [0, 1]]


def test_experts_of_a_node_are_numbered_among_themselves() -> None:
    nodes, inside = node_placements(PLACEMENT, rank=3, ranks_per_node=2)
    assert nodes.experts_of(1).tolist() == [0, 2]
    assert inside.num_experts == 2
    assert inside.table_Ws.tolist() == [[1, 1], [1, 0]]


@given(st.integers(2, 3), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_fewer_elements_leave_nodes_than_at_one_level(num_nodes: int, size: int, data: st.DataObject) -> None:
    world_size = num_nodes * size
    placement = data.draw(placements(world_size=world_size))
    flat = plan_collection(placement, [(world_size, 3)])
    node_W = np.arange(world_size) // size
    at_one_level = sum(
        elements
        for rank in range(world_size)
        for peer, elements in enumerate(flat.send_splits(rank))
        if node_W[rank] != node_W[peer]
    )
    nodes, _ = node_placements(placement, 0, size)
    # Each rail sends its part of the rows: 3 * num_nodes elements of an expert.
    at_two_levels = size * sum(
        plan_collection(nodes, [(num_nodes, 3)]).elements_sent(node) for node in range(num_nodes)
    )
    assert at_two_levels <= at_one_level
    assert at_two_levels == 3 * size * nodes.num_pairs * (num_nodes - 1)


@given(st.integers(1, 3), st.integers(1, 3), st.data())
@settings(max_examples=60, deadline=None)
def test_every_pair_is_reached_through_its_node(num_nodes: int, size: int, data: st.DataObject) -> None:
    placement = data.draw(placements(world_size=num_nodes * size))
    for rank in range(placement.world_size):
        nodes, inside = node_placements(placement, rank, size)
        node, number = divmod(rank, size)
        assert nodes.experts_of(node)[inside.experts_of(number)].tolist() == placement.experts_of(rank).tolist()
