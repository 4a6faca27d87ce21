import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import Forecast, Placement, SwapPolicy
from swiftmoe_lightning.placement.policies.swap import swap_until_even
from swiftmoe_lightning.placement.shares import rank_loads
from tests.placement.policies.cases import cases, table_of


def table_on_nodes(popularity, world_size, slots_per_rank, ranks_per_node):
    policy = SwapPolicy(world_size, slots_per_rank, ranks_per_node)
    (placement,) = policy.place(Forecast.of(np.array([popularity])))
    return placement.table_Ws


def test_the_best_swap_of_the_busiest_bin_is_made_until_none_makes_it_lighter():
    # The case in the docstring: 14, 3 and 7 become 8, 9 and 7.
    load_E = np.array([8.0, 6, 1, 2, 4, 3])
    assert swap_until_even(np.arange(6), load_E, 2).tolist() == [3, 1, 2, 0, 4, 5]


def test_hot_experts_that_share_a_rank_are_parted():
    assert table_of("swap", [10, 10, 0, 0], 2, 2) == [[2, 1], [0, 3]]


def test_even_loads_stay_in_place():
    assert table_of("swap", [5, 5, 5, 5], 2, 2) == table_of("static", [5, 5, 5, 5], 2, 2)


def test_replicas_share_the_load_and_are_as_many_as_in_the_uniform_placement():
    # Two replicas each. Rank 0 has both of the hot expert at first, and gives one away.
    assert table_of("swap", [8, 2], 2, 2) == [[1, 0], [0, 1]]


def test_nodes_are_evened_out_before_ranks():
    # 5 3 | 3 1 and 1 1 | 1 1: the nodes have 12 and 4. One swap between them makes them 8 and 8; then no swap inside a
    # node makes its busier rank lighter.
    assert table_on_nodes([5, 3, 3, 1, 1, 1, 1, 1], 4, 2, ranks_per_node=2).tolist() == [[4, 1], [2, 3], [0, 5], [6, 7]]
    # On one node ranks are all that counts, and the swap is another.
    assert table_on_nodes([5, 3, 3, 1, 1, 1, 1, 1], 4, 2, ranks_per_node=4).tolist() == [[4, 1], [0, 3], [2, 5], [6, 7]]


@given(case=cases(), ranks_per_node=st.sampled_from([1, 2, 3]))
@settings(max_examples=150, deadline=None)
def test_no_node_gets_busier_than_the_busiest_was_and_replicas_stay_uniform(case, ranks_per_node):
    popularity_LE, world_size, slots_per_rank = case
    before = Placement.uniform(len(popularity_LE[0]), world_size, slots_per_rank).table_Ws
    for popularity in popularity_LE:
        after = table_on_nodes(popularity, world_size, slots_per_rank, ranks_per_node)
        assert sorted(after.flatten().tolist()) == sorted(before.flatten().tolist())
        nodes = range(0, world_size, ranks_per_node)
        busiest = [
            max(rank_loads(np.array(popularity), table)[first : first + ranks_per_node].mean() for first in nodes)
            for table in (before, after)
        ]
        assert busiest[1] <= busiest[0] * (1 + 1e-9)


@pytest.mark.parametrize("ranks_per_node", [1, 4])
def test_swaps_even_out_loads_that_no_single_expert_dominates(ranks_per_node):
    popularity = np.random.default_rng(0).permutation(np.arange(1, 65))
    load_W = rank_loads(popularity, table_on_nodes(popularity, 8, 8, ranks_per_node))
    assert load_W.max() <= 1.01 * load_W.mean()
    static_W = popularity.reshape(8, 8).sum(1)
    assert static_W.max() > 1.15 * static_W.mean()
