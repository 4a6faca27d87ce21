import numpy as np
import pytest

from swiftmoe_lightning.analysis.baselines import EPLBPolicy
from swiftmoe_lightning.analysis.baselines.eplb import balanced_packing, replicate_experts
from swiftmoe_lightning.placement import Forecast

# The worked example of EPLB's README: two layers of 12 experts.
README_LOADS = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)


def tables_of(policy, popularity_LE):
    return [placement.slot_to_expert_S.tolist() for placement in policy.place(Forecast.of(np.array(popularity_LE)))]


def test_the_example_of_its_readme_comes_out_slot_by_slot():
    policy = EPLBPolicy(world_size=8, slots_per_rank=2, num_groups=4, num_nodes=2)
    assert tables_of(policy, README_LOADS) == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_each_spare_slot_goes_to_the_expert_with_most_load_a_replica():
    # 90, 40, 20 -> 45 -> 40 (the second expert, not yet the first at 45)
    assert replicate_experts(np.array([90.0, 40, 20]), 6).tolist() == [0, 1, 2, 0, 0, 1]


def test_items_go_by_falling_weight_to_the_lightest_pack_with_room():
    # 9 | 8; 5 beside 8 (13); 4 beside 9 (13).
    assert balanced_packing(np.array([9.0, 4, 8, 5]), 2).tolist() == [[0, 1], [2, 3]]
    # 9 | 1; 1 beside 1; the second pack is full, so the last one goes beside 9.
    assert balanced_packing(np.array([9.0, 1, 1, 1]), 2).tolist() == [[0, 3], [1, 2]]


def test_the_global_policy_replicates_over_all_ranks():
    # Replicas: 12 / 2 twice, 5, 3. Packed: 6 | 6; 5 | 3 in this order, lightest first.
    assert tables_of(EPLBPolicy(2, 2), [[12, 5, 3]]) == [[0, 1, 0, 2]]


def test_where_nodes_do_not_divide_the_groups_the_policy_is_the_global_one():
    assert tables_of(EPLBPolicy(8, 2, 3, 2), README_LOADS) == tables_of(EPLBPolicy(8, 2), README_LOADS)


def test_a_layer_without_tokens_counts_as_uniform():
    assert tables_of(EPLBPolicy(2, 2), [[0, 0]]) == tables_of(EPLBPolicy(2, 2), [[7, 7]])


def test_sizes_that_do_not_divide_are_refused_with_the_fix():
    with pytest.raises(ValueError, match="num_nodes must divide the 8 ranks, got 3"):
        EPLBPolicy(8, 2, 3, 3)
    with pytest.raises(ValueError, match="num_groups must divide the 12 experts, got 8"):
        EPLBPolicy(8, 2, 8, 2).place(Forecast.of(README_LOADS))
