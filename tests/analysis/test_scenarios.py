"""Synthetic traces: counts are drawn about the paths of popularity, and no policy is better than the bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.analysis import (
    CANDIDATES,
    SCENARIOS,
    Machine,
    PlanOptions,
    ScenarioOptions,
    make_plan,
    make_scenario,
    scenario_shares,
)
from swiftmoe_lightning.analysis.scenarios import BURST_PERIOD, ROTATION_STEPS, SWITCH_STEPS

# [2 steps, 2 ranks, 4 experts]; the order of the experts is 1, 2, 0, 3.
TINY = [[[21, 46, 30, 3], [18, 47, 27, 8]], [[12, 52, 25, 11], [10, 48, 26, 16]]]


@st.composite
def options(draw: Any) -> ScenarioOptions:
    num_experts = draw(st.integers(2, 24))
    return ScenarioOptions(
        seed=draw(st.integers(0, 2**40)),
        num_steps=draw(st.integers(1, 45)),
        num_ranks=draw(st.integers(1, 4)),
        num_layers=draw(st.integers(1, 3)),
        num_experts=num_experts,
        top_k=draw(st.integers(1, num_experts)),
        tokens_per_rank=draw(st.integers(1, 300)),
    )


@given(st.sampled_from(sorted(SCENARIOS)), options())
@settings(max_examples=100, deadline=None)
def test_counts_are_drawn_about_shares_that_a_router_can_have(name: str, sizes: ScenarioOptions) -> None:
    trace, share_ULE = make_scenario(name, sizes), scenario_shares(name, sizes)
    assert trace.counts_UWLE.shape == (sizes.num_steps, sizes.num_ranks, sizes.num_layers, sizes.num_experts)
    assert (trace.counts_UWLE.sum(3) == sizes.tokens_per_rank * sizes.top_k).all()
    np.testing.assert_allclose(share_ULE.sum(2), 1, rtol=1e-12)
    assert (share_ULE > 0).all()
    assert (share_ULE <= 1 / sizes.top_k + 1e-9).all()
    # Over all steps, ranks and layers a number of assignments is a sum of independent draws: eight deviations.
    total = sizes.num_ranks * sizes.tokens_per_rank * sizes.top_k
    expected_E, actual_E = total * share_ULE.sum((0, 1)), trace.popularity_ULE.sum((0, 1))
    assert (abs(actual_E - expected_E) <= 8 * np.sqrt(expected_E) + 8).all()


@pytest.mark.parametrize("name", SCENARIOS)
def test_equal_seeds_give_equal_traces_and_others_do_not(name: str) -> None:
    first, again, other = (
        make_scenario(name, ScenarioOptions(seed=seed, num_steps=2, num_ranks=2)).counts_UWLE for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first != other).any()
    assert (first[:, 0] != first[:, 1]).any()


def test_a_tiny_trace_is_what_it_was_on_every_machine() -> None:
    sizes = ScenarioOptions(num_steps=2, num_ranks=2, num_layers=1, num_experts=4, tokens_per_rank=50)
    assert make_scenario("zipf", sizes).counts_UWLE[:, :, 0].tolist() == TINY


def shares(name: str, num_steps: int = 100) -> np.ndarray:
    """[U, E] of the only layer."""
    return scenario_shares(name, ScenarioOptions(num_steps=num_steps, num_layers=1, num_experts=16))[:, 0]


def test_even_zipf_and_hot_stand_still() -> None:
    for name, largest in (("even", 1 / 16), ("zipf", 1 / (1 / np.arange(1, 17)).sum()), ("hot", 0.25)):
        share_UE = shares(name)
        assert (share_UE == share_UE[0]).all()
        assert share_UE[0].max() == pytest.approx(largest)
    hot_E = np.sort(shares("hot")[0])
    np.testing.assert_allclose(hot_E[:-1], 0.75 / 15)


def test_the_hot_spot_rotates_through_all_experts() -> None:
    hot_U = shares("rotating", 16 * ROTATION_STEPS).argmax(1)
    assert (hot_U.reshape(16, ROTATION_STEPS) == hot_U[::ROTATION_STEPS, None]).all()
    assert sorted(hot_U[::ROTATION_STEPS]) == list(range(16))


def test_a_burst_is_a_step_of_one_expert_and_each_time_another() -> None:
    share_UE = shares("burst", 3 * BURST_PERIOD)
    bursts = np.flatnonzero(share_UE.max(1) > 1 / 16 + 1e-9)
    assert bursts.tolist() == [BURST_PERIOD - 1, 2 * BURST_PERIOD - 1, 3 * BURST_PERIOD - 1]
    np.testing.assert_allclose(share_UE[bursts].max(1), 0.4)
    assert len(set(share_UE[bursts].argmax(1))) == 3


def test_a_switch_turns_the_order_round_and_back() -> None:
    share_UE = shares("switch")
    assert (share_UE[SWITCH_STEPS - 1] == share_UE[0]).all()
    assert (share_UE[SWITCH_STEPS].argsort() == share_UE[0].argsort()[::-1]).all()
    assert (share_UE[2 * SWITCH_STEPS] == share_UE[0]).all()


def test_dying_experts_fade_and_survivors_take_over() -> None:
    share_UE = shares("dying", 2000)
    np.testing.assert_allclose(share_UE[0], 1 / 16)
    assert (np.diff(share_UE.max(1)) >= 0).all()
    np.testing.assert_allclose(np.sort(share_UE[-1])[-2:], 0.5, atol=1e-4)


def test_a_skew_relaxes_in_the_second_half() -> None:
    share_UE = shares("relaxing", 1000)
    assert (share_UE[:501] == shares("zipf")[0]).all()
    assert (np.diff(share_UE[501:].max(1)) < 0).all()
    np.testing.assert_allclose(share_UE[-1], 1 / 16, rtol=1e-4)


def test_without_room_for_skew_all_experts_are_even() -> None:
    for name in SCENARIOS:
        np.testing.assert_allclose(scenario_shares(name, ScenarioOptions(num_experts=8, top_k=8)), 1 / 8)


@pytest.mark.parametrize("capacity_factor", [1.0, None])
@pytest.mark.parametrize("name", SCENARIOS)
def test_no_policy_is_better_than_the_bounds(name: str, capacity_factor: float | None) -> None:
    trace = make_scenario(name, ScenarioOptions(num_steps=22, num_ranks=4, num_layers=1, num_experts=8))
    plan = make_plan(
        trace,
        Machine(num_ranks=4, slots_per_rank=3),
        PlanOptions(policies=tuple(CANDIDATES), capacity_factor=capacity_factor),
    ).as_json()
    for policy, numbers in plan["policies"].items():
        assert plan["bounds"]["dropped"] <= numbers["dropped"] + 1e-9, policy
        assert plan["bounds"]["imbalance"] <= numbers["imbalance"] + 1e-9, policy


def test_metadata_says_what_the_trace_is_and_what_to_plan_for() -> None:
    assert make_scenario("hot", ScenarioOptions(num_steps=1, seed=3)).metadata == {
        "scenario": "hot",
        "seed": 3,
        "world_size": 16,
        "slots_per_rank": 5,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"num_experts": 1}, "num_experts must be a whole number of 2 or more, got 1"),
        ({"top_k": 9, "num_experts": 8}, r"top_k must be at most num_experts \(8\), got 9\. Lower it\."),
        ({"num_steps": 10**9}, "a scenario would take .* bytes"),
    ],
)
def test_a_run_that_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScenarioOptions(**changes)


def test_an_unknown_scenario_is_refused() -> None:
    with pytest.raises(ValueError, match="scenario must be one of 'even', 'zipf', .*, got 'calm'"):
        make_scenario("calm")
