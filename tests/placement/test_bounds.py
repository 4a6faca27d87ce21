from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import Placement
from swiftmoe_lightning.placement import CAUSES, Capacity, drop_bounds, imbalance_bounds, plan_dispatch
from swiftmoe_lightning.placement.bounds import _least_over_budget
from tests.placement.cases import counts_of, most_served, placements


def test_what_was_lost_is_split_by_cause():
    # Loads 60, 10, 10 on three ranks of two slots; budget 27. Expert 0 is on one rank alone: 33 dropped, of which with
    # its one replica nothing can be saved; an oracle gives it three, and serves all but one: 80 / 3 = 26.67 of 27.
    placement = Placement([0, 1, 1, 2, 1, 2], 3, 3)
    bounds = drop_bounds(np.array([60, 10, 10]), placement, 33, 27, "rank")
    assert bounds.by_cause == pytest.approx(
        {"split": 33 / 80, "placement": 33 / 80, "prediction": 0, "floor": 0, "rounding": 0}
    )
    assert bounds.losses == pytest.approx(
        {"split": 0, "placement": 0, "prediction": 33 / 80, "floor": 0, "rounding": 0}
    )


def test_imbalance_has_the_same_causes():
    # Rank 0 has both of expert 0's replicas in two slots: another placement of the same numbers would halve its load.
    placement = Placement([0, 0, 1, 2], 3, 2)
    bounds = imbalance_bounds(np.array([60, 10, 10]), placement, np.array([60, 20]))
    assert bounds.achieved == 1.5
    assert bounds.losses == pytest.approx({"split": 0, "placement": 0.5, "prediction": 0, "floor": 0, "rounding": 0})


def test_cold_experts_floor_and_whole_replicas_have_their_price():
    # Two ranks of one slot, experts 90, 0: the cold one needs a slot, so one rank does it all.
    bounds = imbalance_bounds(np.array([90, 0]), Placement([0, 1], 2, 2), np.array([90, 0]))
    assert bounds.losses == pytest.approx({"split": 0, "placement": 0, "prediction": 0, "floor": 1, "rounding": 0})
    # Three ranks of one slot, loads 2 to 1: 2 + 1 replicas fit them; at 3 to 1 the busiest has 1.125 of the mean.
    bounds = imbalance_bounds(np.array([30, 10]), Placement([0, 0, 1], 2, 3), np.array([15, 15, 10]))
    assert bounds.losses["rounding"] == pytest.approx(15 / (40 / 3) - 1)


@st.composite
def steps(draw):
    placement = draw(placements())
    return draw(counts_of(placement)), placement


@given(
    step=steps(), split=st.sampled_from(["balanced", "local_first", "uniform"]), factor=st.sampled_from([0.5, 1.0, 1.3])
)
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("per", ["rank", "slot"])
def test_nothing_drops_less_than_its_bounds(step, split, factor, per):
    counts_WE, placement = step
    plan = plan_dispatch(counts_WE, placement, split, Capacity(factor, per))
    bounds = drop_bounds(counts_WE.sum(0), placement, plan.num_dropped_tokens, plan.budget, per)
    check_chain(bounds)
    assert plan.num_dropped_tokens == pytest.approx(bounds.achieved * counts_WE.sum())


@given(step=steps(), split=st.sampled_from(["balanced", "local_first", "uniform"]))
@settings(max_examples=200, deadline=None)
def test_nothing_is_more_even_than_its_bounds(step, split):
    counts_WE, placement = step
    bounds = imbalance_bounds(counts_WE.sum(0), placement, plan_dispatch(counts_WE, placement, split).wanted_W)
    check_chain(bounds)


def check_chain(bounds):
    values = [bounds.achieved, *bounds.by_cause.values()]
    assert tuple(bounds.by_cause) == CAUSES
    assert all(a >= b - 1e-12 for a, b in zip(values, values[1:], strict=False))
    assert sum(bounds.losses.values()) + values[-1] == pytest.approx(bounds.achieved)


@given(step=steps(), factor=st.sampled_from([0.5, 1.0, 1.3]))
@settings(max_examples=200, deadline=None)
def test_the_bound_on_any_split_is_near_the_maximum_flow_and_never_above(step, factor):
    counts_WE, placement = step
    load_E, total = counts_WE.sum(0), counts_WE.sum()
    budget = Capacity(factor).budget(int(total), placement)
    least = total - most_served(load_E, placement, budget)
    bound = drop_bounds(load_E, placement, int(total), budget, "rank").by_cause["split"] * total
    assert bound <= least + 1e-9
    assert least - bound <= max(0.01 * total, 1)


@given(placement=placements(max_world_size=3, max_experts=3), data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_placement_of_the_same_replicas_beats_the_bound_on_them(placement, data):
    counts_WE = data.draw(counts_of(placement))
    table = placement.slot_to_expert_S[:6].tolist()
    if sorted(set(table)) != list(range(placement.num_experts)) or len(table) % placement.world_size:
        return
    placement = Placement(table, placement.num_experts, placement.world_size)
    load_E = counts_WE.sum(0)
    bounds = imbalance_bounds(load_E, placement, np.array([10**6]))
    for other in set(permutations(table)):
        plan = plan_dispatch(counts_WE, Placement(other, placement.num_experts, placement.world_size))
        if load_E.sum():
            assert plan.wanted_W.max() / plan.wanted_W.mean() >= bounds.by_cause["placement"] - 1e-9


@given(
    loads=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    budget=st.integers(1, 9),
    spare=st.integers(0, 4),
    least=st.integers(0, 1),
    most=st.integers(1, 5),
)
@settings(max_examples=200, deadline=None)
def test_the_oracles_replicas_are_the_best_of_all(loads, budget, spare, least, most):
    num_slots = len(loads) + spare
    every = product(range(least, most + 1), repeat=len(loads))
    best = min(
        sum(max(load - r * budget, 0) for load, r in zip(loads, counts, strict=True))
        for counts in every
        if sum(counts) <= num_slots
    )
    least_drops = _least_over_budget(np.array(loads), budget, num_slots, least_replicas=least, most_replicas=most)
    assert least_drops == best


def test_a_step_without_tokens_lost_nothing():
    placement = Placement([0, 1], 2, 2)
    nothing = np.zeros(2, dtype=np.int64)
    assert imbalance_bounds(nothing, placement, nothing).losses == dict.fromkeys(CAUSES, 0.0)
    assert drop_bounds(nothing, placement, 0, 0, "rank").losses == dict.fromkeys(CAUSES, 0.0)
