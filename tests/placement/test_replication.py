import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement.replication import (
    minmax_replica_counts,
    symi_replica_counts,
    uniform_replica_counts,
)
from tests.placement.cases import algorithm_1


def symi(popularity, num_slots):
    return symi_replica_counts(np.array([popularity]), num_slots)[0].tolist()


def minmax(popularity, num_slots, max_replicas=10**6):
    return minmax_replica_counts(np.array([popularity]), num_slots, max_replicas)[0].tolist()


def test_uniform_counts_differ_by_at_most_one_and_favour_earlier_experts():
    assert uniform_replica_counts(4, 8).tolist() == [2, 2, 2, 2]
    assert uniform_replica_counts(3, 8).tolist() == [3, 3, 2]
    assert uniform_replica_counts(5, 5).tolist() == [1, 1, 1, 1, 1]


def test_symi_gives_replicas_in_proportion_to_popularity():
    assert symi([40, 20, 10, 10], 8) == [4, 2, 1, 1]
    assert symi([10, 10, 10, 10], 8) == [2, 2, 2, 2]


def test_symi_lifts_cold_experts_to_one_replica_and_takes_them_from_the_most_over_served():
    # Goals 7.84, .08, .04, .04 -> floors 7, 1, 1, 1 = 10 of 8 slots: two come off the only expert that has several.
    assert symi([196, 2, 1, 1], 8) == [5, 1, 1, 1]


def test_minmax_puts_each_replica_where_the_largest_share_is():
    assert minmax([40, 20, 10, 10], 8) == [4, 2, 1, 1]
    assert minmax([100, 1, 1], 6) == [4, 1, 1]
    assert minmax([100, 1, 1], 6, max_replicas=3) == [3, 2, 1]
    assert minmax([9, 5, 4], 5) == [2, 2, 1]


@pytest.mark.parametrize("replicas", [symi, minmax])
def test_one_hot_expert_takes_all_spare_slots(replicas):
    assert replicas([0, 0, 500, 0], 12) == [1, 1, 9, 1]


@pytest.mark.parametrize("replicas", [symi, minmax])
def test_zero_popularity_counts_as_uniform(replicas):
    assert replicas([0, 0, 0, 0], 8) == [2, 2, 2, 2]
    assert sorted(replicas([0, 0, 0], 8)) == [2, 3, 3]


def test_minmax_spreads_what_a_capped_expert_leaves_over_evenly_over_the_cold_ones():
    assert minmax([100, 0, 0, 0], 10, max_replicas=4) == [4, 2, 2, 2]


@pytest.mark.parametrize("replicas", [symi, minmax])
def test_as_many_slots_as_experts_is_one_replica_each(replicas):
    assert replicas([5, 0, 900], 3) == [1, 1, 1]


@pytest.mark.parametrize(
    "counts_of",
    [
        lambda: uniform_replica_counts(9, 8),
        lambda: symi_replica_counts(np.ones((2, 9)), 8),
        lambda: minmax_replica_counts(np.ones((2, 9)), 8, 8),
    ],
)
def test_more_experts_than_slots_is_an_error_with_the_fix(counts_of):
    with pytest.raises(ValueError, match="8 slots cannot hold 9 experts.*Use at least 9 slots"):
        counts_of()


@st.composite
def cases(draw, max_experts=12, max_popularity=10**6, max_extra=24):
    popularity = draw(st.lists(st.integers(0, max_popularity), min_size=1, max_size=max_experts))
    return popularity, len(popularity) + draw(st.integers(0, max_extra))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_symi_equals_the_papers_loop(case):
    popularity, num_slots = case
    if sum(popularity):
        assert symi(popularity, num_slots) == algorithm_1(popularity, num_slots)


@given(cases(max_experts=4, max_popularity=60, max_extra=5), st.integers(2, 6))
@settings(max_examples=100, deadline=None)
def test_minmax_reaches_the_least_largest_share_of_any_counts(case, max_replicas):
    popularity, num_slots = case
    num_experts = len(popularity)
    num_slots = min(num_slots, num_experts * max_replicas)
    minmax_counts = minmax(popularity, num_slots, max_replicas)
    tried = (
        max(p / c for p, c in zip(popularity, counts, strict=True))
        for counts in itertools.product(range(1, max_replicas + 1), repeat=num_experts)
        if sum(counts) == num_slots
    )
    assert max(p / c for p, c in zip(popularity, minmax_counts, strict=True)) == pytest.approx(min(tried), rel=1e-9)
    assert max(minmax_counts) <= max_replicas


@given(st.lists(cases(max_experts=6), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_layers_do_not_see_each_other(layers):
    num_experts = min(len(popularity) for popularity, _ in layers)
    num_slots = max(num_slots for _, num_slots in layers)
    table_LE = np.array([popularity[:num_experts] for popularity, _ in layers])
    assert symi_replica_counts(table_LE, num_slots).tolist() == [symi(row, num_slots) for row in table_LE]
    together = minmax_replica_counts(table_LE, num_slots, num_slots)
    assert together.tolist() == [minmax(row, num_slots, num_slots) for row in table_LE]


PRIMES = [101, 211, 307, 401, 503, 601, 701, 809, 907, 1009, 5003, 20011]


@given(st.permutations(PRIMES), st.integers(0, 30))
@settings(max_examples=50, deadline=None)
def test_counts_follow_the_experts_when_they_are_renamed(popularity, extra):
    # Primes: no two experts tie for a slot, so names cannot matter.
    num_slots = len(PRIMES) + extra
    for replicas in (symi, minmax):
        expected = dict(zip(PRIMES, replicas(PRIMES, num_slots), strict=True))
        assert replicas(popularity, num_slots) == [expected[p] for p in popularity]
