import numpy as np
import pytest

from swiftmoe_lightning.analysis.baselines import ShadowingPolicy
from swiftmoe_lightning.placement import Forecast

COPY = 80.0


def table_of(popularity, world_size, slots_per_rank, copy_assignments=COPY):
    policy = ShadowingPolicy(world_size, slots_per_rank, copy_assignments)
    (placement,) = policy.place(Forecast.of(np.array([popularity])))
    return placement.slot_to_expert_S.reshape(world_size, slots_per_rank).tolist()


def test_the_default_is_of_the_rates_in_fastermoes_code():
    # Seconds a unit of the model dim: copy 2 * 4 * 4096 / 6.25e9 = 5.243e-6, compute 2 * 2 * 4096 / 11.5e12 = 1.425e-9,
    # transfer 4 / 6.25e9 = 6.4e-10; 5.243e-6 / (3 * 1.425e-9 + 4 * 6.4e-10) = 767.2.
    policy = ShadowingPolicy(2, 3)
    assert policy._copy_assignments == pytest.approx(767.2, abs=0.1)


def test_the_hottest_experts_are_copied_to_all_ranks_while_a_copy_costs_less_than_it_saves():
    # 1000 -> 600 + 80 -> 560 + 160 would be more: one shadow. The others stay at home.
    assert table_of([100, 1000, 600, 560], 4, 2) == [[0, 1], [1, 1], [2, 1], [3, 1]]


def test_two_experts_are_shadowed_where_both_copies_pay():
    # 1000 -> 600 + 80 -> 100 + 160 -> 90 + 240 would be more.
    assert table_of([100, 1000, 600, 90], 4, 3) == [[0, 1, 2], [1, 2, 1], [1, 2, 1], [3, 1, 2]]


def test_nobody_is_shadowed_while_loads_are_even():
    assert table_of([500, 480, 520, 500], 4, 2) == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_shadows_must_fit_beside_the_experts_at_home():
    # Two at home on each rank of two slots: only an expert that leaves no two behind anywhere could be copied.
    assert table_of([9000, 0, 0, 0], 2, 2) == [[0, 1], [2, 3]]
    assert table_of([9000, 0, 0, 0], 2, 3) == [[1, 0, 1], [2, 3, 0]]
    # Two copies would pay; one slot is free.
    assert table_of([9000, 5000, 0, 0], 4, 2) == [[0, 0], [1, 0], [2, 0], [3, 0]]


def test_a_slower_network_copies_less():
    assert table_of([100, 1000, 600, 560], 4, 2, copy_assignments=500.0) == [
        [0] * 2,
        [1] * 2,
        [2] * 2,
        [3] * 2,
    ]


def test_with_fewer_experts_than_ranks_those_left_over_hold_the_hottest():
    assert table_of([30, 40], 4, 1) == [[0], [1], [1], [1]]
