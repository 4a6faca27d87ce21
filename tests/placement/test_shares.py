import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import Placement
from swiftmoe_lightning.placement import Forecast, make_policy
from swiftmoe_lightning.placement.shares import balanced_shares, uniform_shares
from tests.placement.cases import most_served, placements


def loads(placement, share_P):
    return placement.sum_by_rank(share_P)


def test_balanced_shares_passes_load_along_a_chain():
    # Rank 0: experts 0, 1; rank 1: 1, 2; rank 2: 2, 3. Only passing 1 and 2 on evens out what 0 brings.
    placement = Placement([0, 1, 1, 2, 2, 3], 4, 3)
    load_E = np.array([600, 300, 300, 300])
    assert loads(placement, uniform_shares(load_E, placement)).tolist() == [750, 300, 450]
    assert abs(loads(placement, balanced_shares(load_E, placement)) - [600, 450, 450]).max() <= 9


def test_balanced_shares_evens_out_what_it_can_where_one_expert_is_too_much_for_its_rank():
    placement = Placement([0, 1, 2, 1, 2, 3], 4, 3)
    load_W = loads(placement, balanced_shares(np.array([1000, 200, 200, 200]), placement))
    # Rank 0 keeps its hot expert; the rest shares 600 evenly over the other two.
    assert load_W[0] == pytest.approx(1000, abs=5)
    assert abs(load_W[1:] - 300).max() <= 5


@st.composite
def cases(draw, most=3000):
    placement = draw(placements(max_world_size=6, max_experts=8))
    size = placement.num_experts
    load_E = np.array(draw(st.lists(st.integers(0, most), min_size=size, max_size=size)), dtype=np.int64)
    return placement, load_E


@pytest.mark.parametrize("shares", [uniform_shares, balanced_shares])
@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_an_experts_parts_are_whole_and_add_up_to_its_load(shares, case):
    placement, load_E = case
    share_P = shares(load_E, placement)
    assert share_P.min() >= 0
    assert np.bincount(placement.pair_expert_P, share_P, placement.num_experts).tolist() == load_E.tolist()


@given(case=cases())
@settings(max_examples=200, deadline=None)
def test_balanced_shares_is_never_far_from_the_best_that_any_split_can_do(case):
    placement, load_E = case
    found_W = loads(placement, balanced_shares(load_E, placement))
    total, rounding = int(load_E.sum()), placement.num_pairs + 1
    even = -(-total // placement.world_size)
    served = np.minimum(found_W, even).sum()
    best = most_served(load_E, placement, even)
    assert best - rounding - 0.05 * total <= served <= best
    assert most_served(load_E, placement, int(found_W.max())) == total


def test_balanced_shares_needs_no_tokens():
    placement = Placement([0, 1, 1, 0], 2, 2)
    assert balanced_shares(np.zeros(2, dtype=np.int64), placement).tolist() == [0] * 4


@pytest.mark.parametrize("policy", ["static", "symi", "swap", "packed", "balanced"])
@pytest.mark.parametrize("slots", [2, 4, 8])
def test_balanced_shares_serves_within_a_percent_of_the_optimum_on_skewed_moving_loads(policy, slots):
    rng = np.random.default_rng(slots)
    popularity = rng.dirichlet(np.full(16, 0.4))
    policy = make_policy(policy, 16, slots)
    served = best = total = 0
    for _ in range(12):
        before = rng.multinomial(8192, popularity)
        popularity = popularity * rng.lognormal(0, 0.5, 16)
        popularity /= popularity.sum()
        load_E = rng.multinomial(8192, popularity)
        (placement,) = policy.place(Forecast.of(before[None]))
        even = -(-8192 // 16)
        served += np.minimum(loads(placement, balanced_shares(load_E, placement)), even).sum()
        best += most_served(load_E, placement, even)
        total += 8192
    assert best - served <= 0.01 * total
