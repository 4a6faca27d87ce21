import numpy as np
import pytest
from hypothesis import given, settings

from swiftmoe_lightning.analysis.baselines import FlexMoEPolicy
from swiftmoe_lightning.placement import Forecast, StaticPolicy
from swiftmoe_lightning.placement.shares import rank_loads
from tests.analysis.baselines.cases import histories


def table_after(popularity, world_size, slots_per_rank, **options):
    policy = FlexMoEPolicy(world_size, slots_per_rank, interval=1, **options)
    (placement,) = policy.place(Forecast.of(np.array([popularity])))
    return placement.slot_to_expert_S.reshape(world_size, slots_per_rank).tolist()


def test_the_hottest_expert_takes_a_slot_of_the_coldest():
    # Loads 9 | 3 become 6 | 6.
    assert table_after([9, 3], 2, 2) == [[0, 0], [0, 1]]


def test_experts_without_a_second_replica_change_ranks():
    # Loads 9 | 3: of all swaps, 5 with 2 leaves 6 | 6.
    assert table_after([5, 4, 1, 2], 2, 2) == [[3, 1], [2, 0]]


def test_rounds_go_on_while_the_largest_load_falls():
    # 24 | 2 | 2 | 2 -> 16 | 10 | 2 | 2 -> 12 | 8 | 8 | 2 -> 9.6 | 6.8 | 6.8 | 6.8, and nobody has a slot to spare.
    assert table_after([24, 2, 2, 2], 4, 2) == [[0, 0], [0, 1], [0, 2], [0, 3]]


def test_loads_below_the_threshold_are_left_alone():
    assert table_after([6, 5], 2, 2, threshold=1.1) == [[0, 0], [1, 1]]
    assert table_after([6, 5], 2, 3, threshold=1.05) != [[0, 0, 0], [1, 1, 1]]


def test_one_of_several_ranks_with_the_largest_load_is_relieved():
    # Loads 8 | 8 | 2: a swap lowers only one of the first two, and leaves 5 | 8 | 5.
    assert table_after([4, 4, 4, 4, 1, 1], 3, 2, threshold=1) == [[4, 1], [2, 3], [0, 5]]


def test_placements_are_uniform_at_first_and_stay_between_revisions():
    policy = FlexMoEPolicy(2, 2, interval=3)
    hot, cold = np.array([[9, 3]]), np.array([[3, 9]])
    placements = [policy.place(Forecast.of(p))[0] for p in (hot, hot, cold, hot, hot, hot)]
    static = StaticPolicy(2, 2).place(Forecast.of(hot))[0]
    assert placements[:2] == [static, static]
    assert placements[2].slot_to_expert_S.tolist() == [1, 0, 1, 1]
    assert placements[2] == placements[3] == placements[4]
    assert placements[5] != placements[4]


@given(history=histories())
@settings(max_examples=80, deadline=None)
def test_a_revision_never_makes_the_largest_load_larger(history):
    steps_NLE, world_size, slots_per_rank = history
    policy = FlexMoEPolicy(world_size, slots_per_rank, interval=1, threshold=1.0)
    before = StaticPolicy(world_size, slots_per_rank).place(Forecast.of(steps_NLE[0]))
    for popularity_LE in steps_NLE:
        after = policy.place(Forecast.of(popularity_LE))
        for popularity_E, old, new in zip(popularity_LE, before, after, strict=True):
            old_load, new_load = (
                rank_loads(popularity_E, p.slot_to_expert_S.reshape(world_size, -1)).max() for p in (old, new)
            )
            assert new_load <= old_load
        before = after


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="interval must be a whole number of 1 or more, got 0"):
        FlexMoEPolicy(2, 2, interval=0)
    with pytest.raises(ValueError, match="threshold must be a number of 1 or more"):
        FlexMoEPolicy(2, 2, threshold=0.9)
