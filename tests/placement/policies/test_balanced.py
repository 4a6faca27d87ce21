import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import BalancedPolicy, Forecast, plan_dispatch
from swiftmoe_lightning.placement.policies.balanced import chain_pairs, spare_pairs


def table_of(popularity, world_size, slots_per_rank, spread=0.0, ranks_per_node=1):
    policy = BalancedPolicy(world_size, slots_per_rank, ranks_per_node)
    (placement,) = policy.place(Forecast(np.array([popularity]), np.array([spread])))
    return placement.slot_to_expert_S.reshape(world_size, slots_per_rank).tolist()


def test_a_chain_cuts_the_loads_on_a_line_into_equal_budgets():
    # Loads 1.6, 1.4, 1.0 of 4 ranks' budgets; neighbours share the expert at their cut.
    chain = chain_pairs(np.array([1.6, 1.4, 1.0]), 4, 2)
    pairs = sorted(zip(chain.rank_P.tolist(), chain.expert_P.tolist(), chain.load_P.round(6).tolist(), strict=True))
    assert pairs == [(0, 0, 1.0), (1, 0, 0.6), (1, 1, 0.4), (2, 1, 1.0), (3, 2, 1.0)]


def test_cold_experts_live_whole_on_the_lightest_ranks_and_leave_them_less_of_the_line():
    chain = chain_pairs(np.array([1.5, 0.3, 0.2]), 2, 3)
    pairs = sorted(zip(chain.rank_P.tolist(), chain.expert_P.tolist(), chain.load_P.round(6).tolist(), strict=True))
    assert pairs == [(0, 0, 0.7), (0, 1, 0.3), (1, 0, 0.8), (1, 2, 0.2)]


def test_an_expert_gets_spare_pairs_for_what_its_load_may_come_to():
    # A load of 1 that moves with spread 1 may come to 1 + 3 * sqrt(1.3) = 4.4 budgets; no rank has room for more than
    # one expert more.
    certain = table_of([10, 10, 10, 10], 4, 2, spread=0.0)
    moving = table_of([10, 10, 10, 10], 4, 2, spread=1.0)
    assert [sorted(set(row)) for row in certain] == [[0], [1], [2], [3]]
    assert all(len(set(row)) == 2 for row in moving)


def test_spare_pairs_are_far_from_those_that_an_expert_has():
    chain = chain_pairs(np.full(8, 1.0), 8, 2)
    upper_E = np.where(np.arange(8) == 0, 3.0, 1.0)
    rank_X, expert_X = spare_pairs(chain, upper_E, 8, 2)
    assert expert_X.tolist() == [0, 0]
    home = chain.rank_P[chain.expert_P == 0][0]
    assert sorted(((rank_X - home) % 8).tolist()) == [3, 5] or min((rank_X - home) % 8) >= 2


def test_neighbours_on_the_chain_are_on_different_nodes():
    # Expert 0 needs 2 of 4 ranks: with two ranks a node, one on each.
    table = table_of([20, 10, 10], 4, 1, ranks_per_node=2)
    nodes = {rank // 2 for rank, row in enumerate(table) if 0 in row}
    assert nodes == {0, 1}
    assert {rank // 2 for rank, row in enumerate(table_of([20, 10, 10], 4, 1)) if 0 in row} == {0}


@st.composite
def loads(draw):
    world_size, num_experts = draw(st.integers(1, 9)), draw(st.integers(1, 14))
    least = -(-num_experts // world_size)
    slots_per_rank = draw(st.integers(least, least + 4))
    values = st.one_of(st.just(0), st.integers(1, 50), st.integers(0, 10**6))
    return draw(st.lists(values, min_size=num_experts, max_size=num_experts)), world_size, slots_per_rank


@given(case=loads(), spread=st.sampled_from([0.0, 0.1, 3.0]), ranks_per_node=st.sampled_from([1, 2, 4]))
@settings(max_examples=200, deadline=None)
def test_any_loads_and_spreads_give_every_expert_a_slot(case, spread, ranks_per_node):
    popularity, world_size, slots_per_rank = case
    table = table_of(popularity, world_size, slots_per_rank, spread, ranks_per_node)
    assert {expert for row in table for expert in row} == set(range(len(popularity)))


@given(case=loads())
@settings(max_examples=200, deadline=None)
def test_a_chain_has_few_pairs_and_carries_the_loads_it_was_made_for(case):
    popularity, world_size, _ = case
    num_experts = len(popularity)
    popularity_E = np.array(popularity) if any(popularity) else np.ones(num_experts, dtype=np.int64)
    load_E = popularity_E * (world_size / popularity_E.sum())
    chain = chain_pairs(load_E, world_size, num_experts)
    assert len(chain.rank_P) <= num_experts + world_size - 1
    assert len(set(zip(chain.rank_P.tolist(), chain.expert_P.tolist(), strict=True))) == len(chain.rank_P)
    np.testing.assert_allclose(np.bincount(chain.expert_P, chain.load_P, num_experts), load_E, atol=1e-4)
    # Cold experts are dealt whole, the last of them maybe to a rank that is full by less than half a budget.
    assert np.bincount(chain.rank_P, chain.load_P, world_size).max() <= 1.5


def test_the_split_evens_out_a_chain_made_for_the_same_step():
    popularity_E = np.array([400, 250, 120, 90, 60, 40, 30, 10])
    (placement,) = BalancedPolicy(4, 3).place(Forecast(popularity_E[None], np.zeros(1)))
    wanted_W = plan_dispatch(popularity_E[None], placement).wanted_W
    assert wanted_W.max() <= 1.01 * wanted_W.mean()


PRIMES = [101, 211, 307, 401, 503, 601, 701, 809, 907, 1009, 5003, 20011]


@given(popularity=st.permutations(PRIMES), world_size=st.integers(4, 9), spread=st.sampled_from([0.0, 0.2]))
@settings(max_examples=40, deadline=None)
def test_placements_follow_the_experts_when_they_are_renamed(popularity, world_size, spread):
    expected = table_of(PRIMES, world_size, 3, spread)
    renamed = table_of(popularity, world_size, 3, spread)

    # Without spare pairs names cannot matter, as no two loads tie; spare pairs may tie in their places on the ring.
    def experts_of_ranks(table, names):
        return sorted(sorted({names[e] for e in row}) for row in table)

    if spread == 0:
        assert experts_of_ranks(renamed, popularity) == experts_of_ranks(expected, PRIMES)
    else:
        counts = [
            sorted(names[e] for row in table for e in set(row))
            for table, names in ((renamed, popularity), (expected, PRIMES))
        ]
        assert counts[0] == pytest.approx(counts[1])
