"""What holds for every policy, by whatever name or class it is made."""

import numpy as np
import pytest
from hypothesis import given, settings

from swiftmoe_lightning import Placement, PlacementPolicy
from swiftmoe_lightning.config import PLACEMENTS
from swiftmoe_lightning.placement import Forecast, make_policy
from swiftmoe_lightning.placement.policies import check_placements
from tests.placement.policies.cases import cases


@pytest.mark.parametrize("name", PLACEMENTS)
@given(case=cases())
@settings(max_examples=80, deadline=None)
def test_every_policy_keeps_every_expert_fills_all_slots_and_is_deterministic(name, case):
    popularity_LE, world_size, slots_per_rank = case
    first = make_policy(name, world_size, slots_per_rank).place(Forecast.of(np.array(popularity_LE)))
    again = make_policy(name, world_size, slots_per_rank).place(Forecast.of(np.array(popularity_LE)))
    assert first == again
    assert len(first) == len(popularity_LE)
    for placement in first:
        assert placement.replica_counts_E.min() >= 1
        assert placement.replica_counts_E.sum() == world_size * slots_per_rank
        assert placement.slots_per_rank == slots_per_rank
    alone = make_policy(name, world_size, slots_per_rank).place(Forecast.of(np.array(popularity_LE[:1])))
    assert alone == first[:1]


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize(
    ("num_experts", "world_size", "slots_per_rank"), [(2, 5, 1), (3, 8, 2), (8, 4, 2), (5, 1, 5), (1, 1, 1), (1, 3, 2)]
)
def test_edge_sizes_work_with_any_popularity(name, num_experts, world_size, slots_per_rank):
    one_hot = np.eye(num_experts, dtype=np.int64)[:1] * 999
    for popularity in (one_hot, np.zeros_like(one_hot), np.arange(num_experts)[None]):
        (placement,) = make_policy(name, world_size, slots_per_rank).place(Forecast.of(popularity))
        assert placement.replica_counts_E.sum() == world_size * slots_per_rank


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_thousand_ranks_are_placed(name):
    popularity_LE = np.random.default_rng(0).zipf(1.3, (12, 256)).clip(max=10**7)
    placements = make_policy(name, 1200, 2).place(Forecast.of(popularity_LE))
    assert all(p.slot_to_expert_S.size == 2400 for p in placements)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_more_experts_than_slots_is_an_error_with_the_fix(name):
    with pytest.raises(ValueError, match="4 slots cannot hold 5 experts.*Use at least 5 slots"):
        make_policy(name, 2, 2).place(Forecast.of(np.ones((1, 5), dtype=np.int64)))


class ReversedPolicy(PlacementPolicy):
    def place(self, forecast):
        popularity_LE = forecast.popularity_LE
        num_experts = popularity_LE.shape[1]
        return self.placements_of([np.arange(self.num_slots)[::-1] % num_experts], num_experts) * len(popularity_LE)


def test_a_policy_of_ones_own_is_made_from_its_class():
    policy = make_policy(ReversedPolicy, 2, 2)
    placements = policy.place(Forecast.of(np.ones((2, 3), dtype=np.int64)))
    assert placements == [Placement([0, 2, 1, 0], 3, 2)] * 2
    check_placements(policy, placements, 2, 3)


def test_unknown_names_and_things_that_are_no_policy_are_refused():
    with pytest.raises(
        ValueError, match="placement must be one of 'balanced', 'packed', 'symi', 'swap', 'static', got 'best'"
    ):
        make_policy("best", 2, 2)
    for value in (7, ReversedPolicy(2, 2), dict):
        with pytest.raises(TypeError, match="placement must be a name or a subclass of PlacementPolicy, got"):
            make_policy(value, 2, 2)
