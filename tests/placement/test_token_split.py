import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import Placement
from swiftmoe_lightning.placement import Capacity, plan_dispatch
from tests.placement.cases import counts_of, placements


def sent_WP(plan):
    """All sources' rows, checked against what every rank's plan says it gets."""
    ranks = range(plan.placement.world_size)
    table_WP = np.stack([plan.for_rank(rank).sent_P for rank in ranks])
    for rank in ranks:
        assert plan.for_rank(rank).received_Wd.tolist() == table_WP[:, plan.placement.pair_rank_P == rank].tolist()
    return table_WP


def kept_WB(plan):
    return np.stack([plan.for_rank(rank).kept_B for rank in range(plan.placement.world_size)])


def rows_WW(plan):
    """All sources' split sizes, checked against those of the receivers."""
    ranks = range(plan.placement.world_size)
    table_WW = np.array([plan.for_rank(rank).send_splits for rank in ranks])
    assert [plan.for_rank(rank).receive_splits for rank in ranks] == table_WW.T.tolist()
    assert plan.load_W.tolist() == table_WW.sum(0).tolist()
    return table_WW


def split_tokens(counts_WE, placement, split, ranks_per_node=1):
    return sent_WP(plan_dispatch(counts_WE, placement, split, ranks_per_node=ranks_per_node))


def pairs_of(placement):
    return list(zip(placement.pair_rank_P.tolist(), placement.pair_expert_P.tolist(), strict=True))


# Rank 0 has experts 0, 1; rank 1 has 0 twice; rank 2 has 1, 2. Pairs: (0,0) (0,1) (1,0) (2,1) (2,2).
PLACEMENT = Placement([0, 1, 0, 0, 1, 2], 3, 3)
COUNTS_WE = np.array([[6, 0, 1], [0, 5, 1], [3, 2, 0]])


def test_uniform_split_cuts_each_experts_line_into_equal_shares_a_slot():
    # Expert 0: 9 assignments of ranks 0,0,0,0,0,0,2,2,2; one slot of rank 0 takes 3 and two slots of rank 1 take 6.
    assert split_tokens(COUNTS_WE, PLACEMENT, "uniform").tolist() == [
        [3, 0, 3, 0, 1],
        [0, 3, 0, 2, 1],
        [0, 0, 3, 2, 0],
    ]


def test_local_first_serves_a_ranks_own_tokens_first_within_the_same_shares():
    counts_WE = np.array([[2, 0, 0], [4, 6, 0], [3, 1, 1]])
    # Shares of expert 0: 3, 6; of expert 1: 3, 4. Rank 0 keeps its 2, rank 1 its 4; rank 2 fills what is left.
    assert split_tokens(counts_WE, PLACEMENT, "local_first").tolist() == [
        [2, 0, 0, 0, 0],
        [0, 3, 4, 3, 0],
        [1, 0, 2, 1, 1],
    ]


def test_local_first_prefers_the_same_node_to_another():
    # Four ranks, one expert everywhere, nodes of two. Rank 1's surplus goes to rank 0, rank 2's to rank 3.
    placement = Placement([0, 0, 0, 0], 1, 4)
    counts_WE = np.array([[1], [3], [4], [0]])
    assert split_tokens(counts_WE, placement, "local_first", ranks_per_node=2).tolist() == [
        [1, 0, 0, 0],
        [1, 2, 0, 0],
        [0, 0, 2, 2],
        [0, 0, 0, 0],
    ]


def test_rank_budget_is_pooled_over_a_ranks_experts():
    placement = Placement([0, 1, 2, 3], 4, 2)
    counts_WE = np.array([[4, 1, 0, 1], [3, 0, 1, 2]])
    plan = plan_dispatch(counts_WE, placement, "uniform", Capacity(1.0, "rank"))
    assert sent_WP(plan).tolist() == [[4, 1, 0, 1], [3, 0, 1, 2]]
    # 12 assignments on 2 ranks: budgets of 6. Rank 0 would get 5 + 3 and keeps 3 + 3 (floor(6*5/8) = 3).
    assert kept_WB(plan).tolist() == [[3, 1], [3, 3]]
    assert plan.num_dropped_tokens == 2
    assert plan.load_W.tolist() == [6, 4]


def test_slot_budget_is_each_slots_own():
    placement = Placement([0, 0, 1, 2], 3, 2)
    counts_WE = np.array([[5, 4, 0], [5, 2, 0]])
    plan = plan_dispatch(counts_WE, placement, "uniform", Capacity(1.0, "slot"))
    # 16 assignments on 4 slots: 4 a slot. Expert 0 has 8 for its 10 assignments, expert 1 has 4 for its 6.
    assert kept_WB(plan).tolist() == [[4, 2, 0], [4, 2, 0]]
    assert rows_WW(plan).tolist() == [[4, 2], [4, 2]]
    assert plan.num_dropped_tokens == 4


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_capacity_factors_that_are_no_positive_number_are_refused(factor):
    with pytest.raises(ValueError, match="capacity_factor must be a number above 0, got .* or None to drop no tokens"):
        Capacity(factor)


def test_unknown_capacity_and_split_are_refused():
    with pytest.raises(ValueError, match="capacity_per must be one of 'rank', 'slot', got 'expert'"):
        Capacity(1.0, "expert")
    with pytest.raises(ValueError, match="token_split must be one of 'balanced', 'local_first', 'uniform', got 'best'"):
        plan_dispatch(COUNTS_WE, PLACEMENT, "best")


@st.composite
def cases(draw):
    placement = draw(placements())
    return placement, draw(counts_of(placement)), draw(st.integers(1, 4))


@given(cases(), st.sampled_from(["uniform", "local_first"]))
@settings(max_examples=120, deadline=None)
def test_every_assignment_goes_exactly_once_to_a_rank_of_its_expert(case, split):
    placement, counts_WE, ranks_per_node = case
    assigned_WP = split_tokens(counts_WE, placement, split, ranks_per_node)
    assert assigned_WP.min() >= 0
    total_WE = np.zeros_like(counts_WE)
    for column, (_, expert) in zip(assigned_WP.T, pairs_of(placement), strict=True):
        total_WE[:, expert] += column
    assert total_WE.tolist() == counts_WE.tolist()


@given(cases(), st.sampled_from(["uniform", "local_first"]))
@settings(max_examples=80, deadline=None)
def test_ranks_get_equal_shares_a_slot_to_within_one_assignment(case, split):
    placement, counts_WE, ranks_per_node = case
    load_P = split_tokens(counts_WE, placement, split, ranks_per_node).sum(0)
    load_E = counts_WE.sum(0)
    for load, slots, (_, expert) in zip(load_P, placement.pair_slots_P, pairs_of(placement), strict=True):
        assert abs(load - load_E[expert] * slots / placement.replica_counts_E[expert]) < 1


@given(cases())
@settings(max_examples=80, deadline=None)
def test_local_first_keeps_as_many_tokens_on_their_rank_as_the_shares_allow_and_loads_ranks_like_uniform(case):
    placement, counts_WE, ranks_per_node = case
    even_WP = split_tokens(counts_WE, placement, "uniform")
    local_WP = split_tokens(counts_WE, placement, "local_first", ranks_per_node)
    assert local_WP.sum(0).tolist() == even_WP.sum(0).tolist()
    for pair, (rank, expert) in enumerate(pairs_of(placement)):
        assert local_WP[rank, pair] == min(counts_WE[rank, expert], even_WP[:, pair].sum())
        assert local_WP[rank, pair] >= even_WP[rank, pair]


@given(cases(), st.sampled_from([0.1, 0.5, 1.0, 1.3, 4.0]), st.sampled_from(["rank", "slot"]))
@settings(max_examples=150, deadline=None)
def test_budgets_are_never_exceeded_and_used_up_before_anything_is_dropped(case, factor, per):
    placement, counts_WE, _ = case
    plan = plan_dispatch(counts_WE, placement, "local_first", Capacity(factor, per))
    parts = placement.world_size if per == "rank" else placement.slot_to_expert_S.size
    budget = math.ceil(factor * counts_WE.sum() / parts)
    wanted_WB = np.zeros_like(kept_WB(plan))
    np.add.at(wanted_WB.T, plan.budget_of_pair_P, sent_WP(plan).T)
    budgets_B = np.full(placement.world_size, budget) if per == "rank" else budget * placement.pair_slots_P
    assert (kept_WB(plan) >= 0).all()
    assert (kept_WB(plan) <= wanted_WB).all()
    assert kept_WB(plan).sum(0).tolist() == np.minimum(wanted_WB.sum(0), budgets_B).tolist()
    assert plan.num_dropped_tokens == counts_WE.sum() - kept_WB(plan).sum()
    assert plan.load_W.sum() == kept_WB(plan).sum()


@given(cases())
@settings(max_examples=60, deadline=None)
def test_sources_share_a_budget_in_proportion_to_what_they_would_have_sent(case):
    placement, counts_WE, _ = case
    plan = plan_dispatch(counts_WE, placement, "uniform", Capacity(0.5, "rank"))
    wanted_WB = np.zeros_like(kept_WB(plan))
    np.add.at(wanted_WB.T, plan.budget_of_pair_P, sent_WP(plan).T)
    total_B = wanted_WB.sum(0)
    fair_WB = wanted_WB * kept_WB(plan).sum(0) / np.maximum(total_B, 1)
    assert (np.abs(kept_WB(plan) - fair_WB) < 1).all()


@given(cases())
@settings(max_examples=40, deadline=None)
def test_without_a_capacity_nothing_is_dropped(case):
    placement, counts_WE, _ = case
    plan = plan_dispatch(counts_WE, placement, "local_first")
    assert plan.num_dropped_tokens == 0
    assert rows_WW(plan).sum(1).tolist() == counts_WE.sum(1).tolist()
