from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import Placement
from swiftmoe_lightning.placement import Capacity, Forecast, make_policy, plan_dispatch
from swiftmoe_lightning.placement.routes import Routes
from tests.placement.cases import counts_of, placements
from tests.placement.whole_tables import WholeTables

# Four ranks of one expert each; the experts' pairs are (0, 0) (1, 1) (2, 0) (3, 0).
PLACEMENT = Placement([0, 1, 0, 0], 2, 4)
# The picture of `Routes`: supplies of 4, 6 and 2, open shares of 5, 3 and 4.
COUNTS_WE = np.array([[4, 0], [6, 0], [2, 0], [0, 0]])
SHARE_P = np.array([5, 0, 3, 4])


def test_sources_send_where_their_supply_overlaps_the_open_shares() -> None:
    routes = Routes(COUNTS_WE, PLACEMENT, SHARE_P, 0)
    assert routes.sent_before(0).tolist() == [[0, 0, 0, 0], [4, 0, 0, 0]]
    assert routes.sent_before(1).tolist() == [[4, 0, 0, 0], [5, 0, 3, 2]]
    assert routes.sent_before(2).tolist() == [[5, 0, 3, 2], [5, 0, 3, 4]]
    assert routes.received_before(0).tolist() == [[0], [4], [5], [5], [5]]
    assert routes.received_before(1).tolist() == [[0]] * 5
    assert routes.received_before(3).tolist() == [[0], [0], [2], [4], [4]]


def sent(routes: Routes, rank: int) -> list[int]:
    before, after = routes.sent_before(rank)
    return (after - before).tolist()


def test_ranks_serve_themselves_then_their_nodes_then_the_world() -> None:
    # One expert on five ranks, of which each takes 2. Ranks 0 and 3 have one left over, ranks 2 and 4 take one more.
    placement, counts_WE, share_P = Placement([0] * 5, 1, 5), np.array([[3], [2], [1], [3], [1]]), np.full(5, 2)
    world = Routes(counts_WE, placement, share_P, 1)
    assert (sent(world, 0), sent(world, 3)) == ([2, 0, 1, 0, 0], [0, 0, 0, 2, 1])
    # Nodes of ranks 0 and 1, 2 and 3, and 4 alone.
    nodes = Routes(counts_WE, placement, share_P, 2)
    assert (sent(nodes, 0), sent(nodes, 3)) == ([2, 0, 0, 0, 1], [0, 0, 1, 2, 0])
    assert nodes.sent_before(3).tolist() == [[2, 2, 1, 0, 1], [2, 2, 2, 2, 1]]
    assert nodes.received_before(2).tolist() == [[0], [0], [0], [1], [2], [2]]
    assert nodes.received_before(4).tolist() == [[0], [1], [1], [1], [1], [2]]


def test_a_rank_learns_what_it_sends_keeps_and_gets() -> None:
    placement = Placement([0, 1, 0, 2], 3, 2)
    counts_WE = np.array([[8, 3, 1], [2, 1, 5]])
    plan_0 = plan_dispatch(counts_WE, placement, "local_first", Capacity(0.7)).for_rank(0)
    # Both ranks take 5 of expert 0. Of 20 assignments each rank may compute 7: of 9 that want to, rank 0 keeps 6 of its
    # own 8 (7 * 8 // 9) and one of rank 1's; and of 11 on rank 1, 2 of rank 0's 4 (7 * 4 // 11).
    assert plan_0.sent_P.tolist() == [5, 3, 3, 1]
    assert plan_0.kept_B.tolist() == [6, 2]
    assert plan_0.received_Wd.tolist() == [[5, 3], [0, 1]]
    assert (plan_0.send_splits, plan_0.receive_splits) == ([6, 2], [6, 1])


def plans_of_all_ranks(counts_WE, placement, split, capacity, ranks_per_node):
    """Every rank's plan, checked against the other ends of what it sends."""
    plan = plan_dispatch(counts_WE, placement, split, capacity, ranks_per_node)
    plans = [plan.for_rank(rank) for rank in range(placement.world_size)]
    sent_WP = np.stack([plan.sent_P for plan in plans])
    assert sent_WP.sum(0).tolist() == plan.share_P.tolist()
    for rank, own in enumerate(plans):
        assert own.received_Wd.tolist() == sent_WP[:, placement.pair_rank_P == rank].tolist()
        assert own.receive_splits == [other.send_splits[rank] for other in plans]
        assert sum(own.receive_splits) == plan.load_W[rank]
        assert sum(own.send_splits) == own.kept_B.sum() <= own.sent_P.sum() == counts_WE[rank].sum()
    return plans


def assert_equals_whole_tables(counts_WE, placement, split, capacity, ranks_per_node):
    with patch("swiftmoe_lightning.placement.token_split.Routes", WholeTables):
        plain = plans_of_all_ranks(counts_WE, placement, split, capacity, ranks_per_node)
    plans = plans_of_all_ranks(counts_WE, placement, split, capacity, ranks_per_node)
    for ours, theirs in zip(plans, plain, strict=True):
        for name in ("sent_P", "kept_B", "received_Wd"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
            assert getattr(ours, name).dtype == np.int64
        assert (ours.send_splits, ours.receive_splits) == (theirs.send_splits, theirs.receive_splits)


CAPACITIES = [None, Capacity(0.3), Capacity(1.0), Capacity(0.5, "slot"), Capacity(1.3, "slot")]


@given(st.data(), st.sampled_from(["uniform", "local_first", "balanced"]), st.sampled_from(CAPACITIES))
@settings(max_examples=200, deadline=None)
def test_every_ranks_plan_agrees_with_the_others_and_equals_that_of_whole_tables(data, split, capacity):
    placement = data.draw(placements())
    counts_WE, ranks_per_node = data.draw(counts_of(placement)), data.draw(st.integers(1, 6))
    assert_equals_whole_tables(counts_WE, placement, split, capacity, ranks_per_node)


@pytest.mark.parametrize("ranks_per_node", [1, 8, 12])
@pytest.mark.parametrize("capacity", [None, Capacity(1.0), Capacity(0.8, "slot")])
def test_plans_of_many_ranks_on_uneven_nodes_equal_those_of_whole_tables(ranks_per_node, capacity):
    rng = np.random.default_rng(0)
    before_WE, counts_WE = rng.multinomial(500, rng.dirichlet(np.full(24, 0.5)), size=(2, 42))
    for policy in ("balanced", "packed", "symi"):
        (placement,) = make_policy(policy, 42, 2).place(Forecast.of(before_WE.sum(0)[None]))
        assert_equals_whole_tables(counts_WE, placement, "balanced", capacity, ranks_per_node)
