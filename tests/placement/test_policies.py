import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import Placement, PlacementPolicy
from swiftmoe_lightning.config import PLACEMENTS
from swiftmoe_lightning.placement import Forecast, make_policy
from swiftmoe_lightning.placement.policy import check_placements


def table_of(name, popularity, world_size, slots_per_rank):
    policy = make_policy(name, world_size, slots_per_rank)
    (placement,) = policy.place(Forecast.of(np.array([popularity]), spread=0.0))
    return placement.slot_to_expert_S.reshape(world_size, slots_per_rank).tolist()


def test_static_lays_equal_replicas_out_expert_by_expert_whatever_the_popularity():
    assert table_of("static", [900, 0, 0], 4, 2) == [[0, 0], [0, 1], [1, 1], [2, 2]]


def test_symi_lays_replicas_by_popularity_out_expert_by_expert():
    assert table_of("symi", [40, 20, 10, 10], 4, 2) == [[0, 0], [0, 0], [1, 1], [2, 3]]


def test_packed_pairs_hot_experts_with_cold_ones():
    # Shares 10 x 4, 10 x 2, 10, 2: every rank gets one replica of the hot expert and one other.
    assert table_of("packed", [40, 20, 10, 2], 4, 2) == [[0, 1], [0, 1], [0, 2], [0, 3]]


def test_packed_gives_the_heaviest_replica_of_a_round_to_the_lightest_rank():
    # Round 1 deals loads 50, 30 to ranks 0, 1; round 2 deals 20, 1: the 20 goes beside the 30.
    assert table_of("packed", [50, 30, 20, 1], 2, 2) == [[0, 3], [1, 2]]


def test_packed_with_room_for_all_hosts_every_expert_everywhere():
    assert table_of("packed", [7, 0, 1], 2, 4) == [[0, 1, 2, 0], [0, 1, 2, 0]]


@st.composite
def cases(draw):
    world_size, num_experts = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    least = -(-num_experts // world_size)
    slots_per_rank = draw(st.integers(least, least + 3))
    loads = st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 10**7))
    num_layers = draw(st.integers(1, 3))
    row = st.lists(loads, min_size=num_experts, max_size=num_experts)
    return draw(st.lists(row, min_size=num_layers, max_size=num_layers)), world_size, slots_per_rank


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


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_packed_puts_at_most_one_replica_of_an_expert_on_a_rank(case):
    popularity_LE, world_size, slots_per_rank = case
    if slots_per_rank < len(popularity_LE[0]):
        for placement in make_policy("packed", world_size, slots_per_rank).place(Forecast.of(np.array(popularity_LE))):
            assert placement.pair_slots_P.max() == 1


PRIMES = [101, 211, 307, 401, 503, 601, 701, 809, 907, 1009, 5003, 20011]


@given(popularity=st.permutations(PRIMES), world_size=st.integers(4, 9), slots_per_rank=st.integers(3, 5))
@settings(max_examples=40, deadline=None)
def test_packed_follows_the_experts_when_they_are_renamed(popularity, world_size, slots_per_rank):
    # Primes: no two shares tie, so names cannot matter.
    expected = table_of("packed", PRIMES, world_size, slots_per_rank)
    found = table_of("packed", popularity, world_size, slots_per_rank)
    assert [[popularity[e] for e in row] for row in found] == [[PRIMES[e] for e in row] for row in expected]


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
    found = make_policy(name, 1200, 2).place(Forecast.of(popularity_LE))
    assert all(p.slot_to_expert_S.size == 2400 for p in found)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_more_experts_than_slots_is_an_error_with_the_fix(name):
    with pytest.raises(ValueError, match="4 slots cannot hold 5 experts.*Use at least 5 slots"):
        make_policy(name, 2, 2).place(Forecast.of(np.ones((1, 5), dtype=np.int64)))


class ReversedPolicy(PlacementPolicy):
    def place(self, forecast):
        popularity_LE = forecast.popularity_LE
        num_experts = popularity_LE.shape[1]
        return self.placements_of([np.arange(self.num_slots)[::-1] % num_experts], num_experts) * len(popularity_LE)


class TooNarrowPolicy(PlacementPolicy):
    def place(self, forecast):
        popularity_LE = forecast.popularity_LE
        return [Placement(np.arange(self.world_size), 2, self.world_size) for _ in popularity_LE]


def test_a_policy_of_ones_own_is_made_from_its_class():
    policy = make_policy(ReversedPolicy, 2, 2)
    found = policy.place(Forecast.of(np.ones((2, 3), dtype=np.int64)))
    assert found == [Placement([0, 2, 1, 0], 3, 2)] * 2
    check_placements(policy, found, 2, 3)


def test_a_policy_that_forgets_slots_or_layers_is_told_so():
    policy = make_policy(TooNarrowPolicy, 2, 2)
    found = policy.place(Forecast.of(np.ones((1, 2), dtype=np.int64)))
    with pytest.raises(ValueError, match=r"must place 2 experts on 2 ranks of 2 slots, got .* 2 ranks of 1 slots"):
        check_placements(policy, found, 1, 2)
    with pytest.raises(ValueError, match=r"TooNarrowPolicy.place gave 1 placements for 3 layers"):
        check_placements(policy, found, 3, 2)


def test_unknown_names_and_things_that_are_no_policy_are_refused():
    with pytest.raises(ValueError, match="placement must be one of 'balanced', 'packed', 'symi', 'static', got 'best'"):
        make_policy("best", 2, 2)
    for value in (7, ReversedPolicy(2, 2), dict):
        with pytest.raises(TypeError, match="placement must be a name or a subclass of PlacementPolicy, got"):
            make_policy(value, 2, 2)
