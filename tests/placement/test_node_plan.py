"""Who sends what in the two steps of an exchange at two levels."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import LinkRows, NodePlan, Placement

# 2 nodes of 2 ranks, an expert a rank: the pairs are (rank 0, expert 0) to (rank 3, expert 3).
PLACEMENT = Placement(np.arange(4), 4, 4)
# Rank 0 has two tokens for experts 2 and 3, and one for 0 and 3; rank 3 has one for 0 and 2; ranks 1 and 2 have none.
SENT_WP = np.array([[1, 0, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]])
ROWS_WG = np.array([[1, 3], [0, 0], [0, 0], [1, 1]])


def test_literal_splits():
    plan = NodePlan(ROWS_WG, SENT_WP, PLACEMENT, 2)
    first, third = plan.for_rank(0), plan.for_rank(2)
    assert (first.rail_send, first.rail_receive) == ([1, 3], [1, 0])
    assert (first.node_send, first.node_receive) == ([1, 0], [1, 1])
    # Rank 2 relays the three tokens of rank 0: two assignments for itself and three for rank 3. From rank 3 it gets
    # rank 3's own token for expert 2.
    assert (third.rail_send, third.rail_receive) == ([0, 0], [3, 0])
    assert (third.node_send, third.node_receive) == ([2, 3], [2, 1])
    assert third.received_nd.tolist() == [[2], [1]]
    assert (third.pairs.start, third.pairs.stop) == (2, 4)


def test_literal_rows_on_each_kind_of_link():
    plan = NodePlan(ROWS_WG, SENT_WP, PLACEMENT, 2)
    # Flat: rank 0's five assignments for node 1 and rank 3's one for node 0; inside, rank 3 to rank 2.
    assert plan.flat == LinkRows(inside=1, between=6)
    # Two levels: three tokens and one. Inside: rank 2 to rank 3 three, rank 3 to 2 one, rank 1 to rank 0 one.
    assert plan.two_level == LinkRows(inside=5, between=4)


@pytest.mark.parametrize(
    ("row_bytes", "label_bytes", "speed_ratio", "expected"),
    [
        # Only links between nodes count: 4 * (100 + l) against 6 * 100.
        (100, 49, math.inf, True),
        (100, 50, math.inf, False),
        # Inside four rows more: 400 / ratio against the 200 that are saved.
        (100, 0, 2.1, True),
        (100, 0, 2.0, False),
    ],
)
def test_two_levels_pay_where_what_they_save_between_nodes_is_more_than_they_add(
    row_bytes, label_bytes, speed_ratio, expected
):
    assert NodePlan(ROWS_WG, SENT_WP, PLACEMENT, 2).pays(row_bytes, label_bytes, speed_ratio) is expected


def routed(rng, placement, num_tokens_W, top_k, ranks_per_node):
    """Random assignments, each to a random pair of its expert: (rows_WG, sent_WP)."""
    num_ranks = placement.world_size
    rows_WG = np.zeros((num_ranks, num_ranks // ranks_per_node), dtype=np.int64)
    sent_WP = np.zeros((num_ranks, placement.num_pairs), dtype=np.int64)
    for rank, num_tokens in enumerate(num_tokens_W):
        for _ in range(num_tokens):
            experts = rng.choice(placement.num_experts, top_k, replace=False)
            pairs = [rng.choice(np.flatnonzero(placement.pair_expert_P == expert)) for expert in experts]
            sent_WP[rank, pairs] += 1
            rows_WG[rank, np.unique(placement.pair_rank_P[pairs] // ranks_per_node)] += 1
    return rows_WG, sent_WP


@given(
    seed=st.integers(0, 2**32 - 1),
    nodes=st.sampled_from([(1, 2), (2, 2), (2, 3), (3, 2), (4, 1)]),
    slots=st.integers(2, 4),
    top_k=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_what_is_sent_is_received_and_never_more_goes_between_nodes_than_flat(seed, nodes, slots, top_k):
    rng, (num_nodes, size) = np.random.default_rng(seed), nodes
    num_ranks, num_experts = num_nodes * size, 4
    spare = num_ranks * slots - num_experts
    placement = Placement(rng.permutation(np.r_[:4, rng.integers(num_experts, size=spare)]), num_experts, num_ranks)
    rows_WG, sent_WP = routed(rng, placement, rng.integers(0, 9, num_ranks), top_k, size)
    plan = NodePlan(rows_WG, sent_WP, placement, size)
    assert plan.two_level.between <= plan.flat.between
    parts = [plan.for_rank(rank) for rank in range(num_ranks)]
    for rank, part in enumerate(parts):
        node, number = divmod(rank, size)
        rail, mates = parts[number::size], parts[node * size : (node + 1) * size]
        assert part.rail_receive == [other.rail_send[node] for other in rail]
        assert part.node_receive == [mate.node_send[number] for mate in mates]
        assert part.received_nd.sum(0).tolist() == sent_WP[:, placement.pairs_of(rank, rank + 1)].sum(0).tolist()
    inside = sum(sum(part.node_send) - part.node_send[rank % size] for rank, part in enumerate(parts))
    between = sum(sum(part.rail_send) - part.rail_send[rank // size] for rank, part in enumerate(parts))
    assert plan.two_level == LinkRows(inside, between)


def test_top_8_over_8_nodes_sends_a_third_less_between_nodes():
    rng, placement = np.random.default_rng(0), Placement(np.arange(64), 64, 64)
    plan = NodePlan(*routed(rng, placement, [20] * 64, 8, 8), placement, 8)
    # A token with 8 of 64 experts has some on 5.43 of 8 nodes in the mean: 4.75 of 7 on others.
    assert plan.two_level.between / plan.flat.between == pytest.approx(4.75 / 7, abs=0.01)
