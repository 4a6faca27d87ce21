import numpy as np
import pytest
from hypothesis import given, settings

from swiftmoe_lightning.analysis.baselines import LPTPolicy
from swiftmoe_lightning.placement import Forecast
from tests.analysis.baselines.cases import histories


def tables_of(policy, *steps):
    placements = [policy.place(Forecast.of(np.array([popularity])))[0] for popularity in steps]
    return [p.slot_to_expert_S.reshape(policy.world_size, -1).tolist() for p in placements]


def test_experts_go_by_falling_load_to_the_least_loaded_rank():
    # 5 | 4, then 2 beside 4, then 1 beside 5: 6 | 6, from 9 | 3.
    assert tables_of(LPTPolicy(2, 2), [5, 4, 2, 1]) == [[[0, 3], [1, 2]]]


def test_a_placement_stays_unless_the_largest_load_falls():
    policy = LPTPolicy(2, 2)
    first, second, third = tables_of(policy, [5, 4, 2, 1], [9, 1, 1, 1], [1, 6, 6, 1])
    # 10 | 2 is the best that two a rank can do; then 2 | 12 becomes 7 | 7.
    assert first == second == [[0, 3], [1, 2]]
    assert third == [[2, 0], [1, 3]]


def test_on_ties_an_expert_stays_where_it_is():
    # Both ranks are empty when expert 2 is dealt: it stays, and expert 3 moves.
    assert tables_of(LPTPolicy(2, 3), [0, 0, 9, 8]) == [[[3, 0, 1], [2, 2, 2]]]


def test_spare_slots_repeat_experts_of_the_same_rank_hottest_first():
    # The static home while nothing is gained: one expert a rank.
    assert tables_of(LPTPolicy(2, 3), [5, 1]) == [[[0, 0, 0], [1, 1, 1]]]
    # 9 | 4 + 3 + 2, from 13 | 5.
    assert tables_of(LPTPolicy(2, 4), [9, 4, 3, 2]) == [[[0, 0, 0, 0], [1, 2, 3, 1]]]


def test_with_fewer_experts_than_ranks_those_left_over_hold_the_hottest():
    # At first ranks 0, 1 hold expert 0, and ranks 2, 3 expert 1. 12 / 2 falls to 12 / 3; for equals nothing falls.
    first, second, third = tables_of(LPTPolicy(4, 1), [2, 12], [3, 3], [12, 2])
    assert first == second == [[0], [1], [1], [1]]
    assert third == [[0], [1], [0], [0]]


@given(history=histories())
@settings(max_examples=80, deadline=None)
def test_an_expert_has_one_rank_where_there_are_enough_experts(history):
    steps_NLE, world_size, slots_per_rank = history
    policy = LPTPolicy(world_size, slots_per_rank)
    num_experts = steps_NLE.shape[2]
    for popularity_LE in steps_NLE:
        for placement in policy.place(Forecast.of(popularity_LE)):
            assert placement.num_pairs == max(num_experts, world_size)


def test_an_interval_keeps_placements_between_revisions():
    first, second = tables_of(LPTPolicy(2, 2, interval=2), [5, 4, 2, 1], [5, 4, 2, 1])
    assert first == [[0, 1], [2, 3]]
    assert second == [[0, 3], [1, 2]]


def test_a_policy_serves_one_set_of_layers():
    policy = LPTPolicy(2, 2)
    policy.place(Forecast.of(np.ones((2, 3))))
    with pytest.raises(ValueError, match="remembers 2 layers of 3 experts, got popularity of 1 layers of 4"):
        policy.place(Forecast.of(np.ones((1, 4))))
