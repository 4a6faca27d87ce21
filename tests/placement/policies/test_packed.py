import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import Forecast, make_policy
from tests.placement.policies.cases import cases, table_of


def test_packed_pairs_hot_experts_with_cold_ones():
    # Shares 10 x 4, 10 x 2, 10, 2: every rank gets one replica of the hot expert and one other.
    assert table_of("packed", [40, 20, 10, 2], 4, 2) == [[0, 1], [0, 1], [0, 2], [0, 3]]


def test_packed_gives_the_heaviest_replica_of_a_round_to_the_lightest_rank():
    # Round 1 deals loads 50, 30 to ranks 0, 1; round 2 deals 20, 1: the 20 goes beside the 30.
    assert table_of("packed", [50, 30, 20, 1], 2, 2) == [[0, 3], [1, 2]]


def test_packed_with_room_for_all_has_every_expert_everywhere():
    assert table_of("packed", [7, 0, 1], 2, 4) == [[0, 1, 2, 0], [0, 1, 2, 0]]


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
    renamed = table_of("packed", popularity, world_size, slots_per_rank)
    assert [[popularity[e] for e in row] for row in renamed] == [[PRIMES[e] for e in row] for row in expected]
