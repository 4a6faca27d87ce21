from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.analysis import CANDIDATES, Machine, Plan, PlanOptions, Sizes, Trace, make_plan
from tests.analysis.baselines.cases import histories

# [6 steps, 2 ranks, 2 layers, 8 experts]
COUNTS = np.random.default_rng(0).integers(0, 50, (6, 2, 2, 8))
MACHINE = Machine(num_ranks=4, slots_per_rank=3)
CAUSES = ["split", "placement", "prediction", "floor", "rounding"]


def plan(machine: Machine = MACHINE, **options: Any) -> Plan:
    return make_plan(Trace(COUNTS), machine, PlanOptions(**options))


def numbers(machine: Machine = MACHINE, **options: Any) -> dict[str, dict[str, Any]]:
    policies: dict[str, dict[str, Any]] = plan(machine, **options).as_json()["policies"]
    return policies


@pytest.mark.parametrize("speeds", [{}, {"link_bytes": 1e9, "flops": 1e12}])
@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_the_json_has_these_keys_and_types(capacity_factor: float | None, speeds: dict[str, float]) -> None:
    machine = Machine(num_ranks=4, slots_per_rank=3, **speeds)
    as_json = json.loads(json.dumps(plan(machine, policies=["symi", "lpt"], capacity_factor=capacity_factor).as_json()))
    assert list(as_json.pop("policies")) == ["symi", "lpt"]
    assert as_json.pop("bounds").keys() == {"dropped", "imbalance"}
    assert as_json == {
        "trace": {"steps": 6, "layers": 2, "experts": 8, "assignments": int(COUNTS.sum())},
        "ranks": 4,
        "slots_per_rank": 3,
        "capacity_factor": capacity_factor,
        "lag": 1,
        "expert_bytes": 1_000_000,
    }
    seconds = float if speeds else type(None)
    for values in numbers(machine, policies=["symi", "lpt"], capacity_factor=capacity_factor).values():
        assert {name: type(value) for name, value in values.items()} == {
            "dropped": float,
            "imbalance": float,
            "imbalance_max": float,
            "bytes_gradients": int,
            "bytes_weights": int,
            "bytes_paper": int,
            "bytes_state_moved": int,
            "step_seconds": seconds,
            "step_seconds_paper": seconds,
            "pairs": float,
            "replicas_moved": float,
            "planning_seconds": float,
            "capacity_per": type(None) if capacity_factor is None else str,
            "token_split": str,
            "label": str,
            "achieved": float,
            "losses": dict,
            "bounds": dict,
        }
        assert list(values["losses"]) == list(values["bounds"]) == CAUSES


def test_the_numbers_of_a_small_trace_are_found_by_hand() -> None:
    # Static: [0 0 | 1 1] on two ranks of two slots, for ever; the first step has all of expert 0.
    trace = Trace(np.array([[[[8, 0]]], [[[4, 4]]]]))
    machine = Machine(
        num_ranks=2,
        slots_per_rank=2,
        expert_bytes=10,
        link_bytes=10.0,
        flops=60.0,
        assignment_bytes=1,
        assignment_flops=30.0,
    )
    as_json = make_plan(trace, machine, PlanOptions(policies=["static"], capacity_factor=1.0)).as_json()
    static = as_json["policies"]["static"]
    # Budgets are 2 a slot: of the eight four are computed, then all eight.
    assert static["dropped"] == 4 / 16
    assert (static["imbalance"], static["imbalance_max"]) == (1.5, 2.0)
    assert static["pairs"] == 2
    # G (D - D / W) = 10 * 1; the paper's way 10 * (2 D - E - D / W) + 10 * S (1 - 1 / W) = 10 + 20.
    assert (static["bytes_gradients"], static["bytes_weights"], static["bytes_paper"]) == (10, 10, 30)
    # 4 assignments of half a second, both times. Phases: half a gradient and half a weight, 10 bytes in all; tokens:
    # 4 assignments, 4 times, half of them, 8 bytes.
    assert static["step_seconds"] == pytest.approx(2 + 1.0 + 0.8)
    # The paper's bound is s (W - 1) / W = 1 for each phase.
    assert static["step_seconds_paper"] == pytest.approx(2 + 2.0 + 0.8)
    assert (static["capacity_per"], static["token_split"], static["label"]) == ("slot", "uniform", "slot budget")
    # One replica on each rank would have dropped nothing.
    assert as_json["bounds"] == {"dropped": 0, "imbalance": 1}


def test_each_policy_has_the_capacity_of_its_authors() -> None:
    capacities = {
        name: values["capacity_per"] for name, values in numbers(policies=[*CANDIDATES], capacity_factor=1.0).items()
    }
    by_slot = ["symi", "static", "flexmoe-10", "flexmoe-50", "flexmoe-100"]
    assert capacities == {name: "slot" if name in by_slot else "rank" for name in CANDIDATES}


@pytest.mark.parametrize("capacity", ["rank", "slot"])
def test_one_budget_for_all_overrides_their_own(capacity: str) -> None:
    own = numbers(policies=["balanced", "symi"], capacity_factor=1.0)
    policies = numbers(policies=["balanced", "symi"], capacity_factor=1.0, capacity_per=capacity)
    assert {values["capacity_per"] for values in policies.values()} == {capacity}
    same, other = ("balanced", "symi") if capacity == "rank" else ("symi", "balanced")
    assert policies[same]["dropped"] == own[same]["dropped"]
    assert policies[other]["dropped"] != own[other]["dropped"]


def test_without_a_capacity_nothing_is_dropped() -> None:
    for values in numbers(policies=[*CANDIDATES]).values():
        assert (values["capacity_per"], values["dropped"]) == (None, 0)


def test_only_where_state_lives_beside_weights_does_it_move() -> None:
    moved = numbers(policies=[*CANDIDATES])
    assert [name for name, values in moved.items() if values["bytes_state_moved"]] == ["lpt"]
    # New pairs a step, each with state of 5 and weights of 2 bytes.
    small = Machine(num_ranks=4, slots_per_rank=3, expert_bytes=2, state_bytes=5)
    lpt = numbers(small, policies=["lpt"])["lpt"]
    assert lpt["bytes_state_moved"] == round(lpt["replicas_moved"] * 7) > 0


def test_flexmoe_moves_state_at_its_interval() -> None:
    counts = np.tile([[40, 3, 2, 1]], (21, 1, 1, 1))
    options = PlanOptions(policies=["flexmoe-10", "flexmoe-50", "balanced"])
    policies = make_plan(Trace(counts), Machine(num_ranks=4, slots_per_rank=2), options).as_json()["policies"]
    assert policies["flexmoe-10"]["bytes_state_moved"] > 0
    assert policies["flexmoe-50"]["bytes_state_moved"] == policies["balanced"]["bytes_state_moved"] == 0
    assert policies["balanced"]["replicas_moved"] > 0


def test_an_oracle_is_one_whatever_the_lag() -> None:
    late = plan(policies=["oracle", "shadowing", "packed"], lag=3)
    assert {name: outcome.rules.lag for name, outcome in late.outcomes.items()} == {
        "oracle": 0,
        "shadowing": 0,
        "packed": 3,
    }


def test_a_lag_of_0_and_an_oracle_are_the_same() -> None:
    policies = numbers(policies=["oracle", "packed"], capacity_factor=1.0, lag=0)
    assert policies["oracle"]["dropped"] == policies["packed"]["dropped"]


@given(
    history=histories().filter(lambda history: history[0].any()),
    capacity_factor=st.sampled_from([None, 0.6, 1.0, 1.25]),
    capacity=st.sampled_from([None, "rank", "slot"]),
)
@settings(max_examples=60, deadline=None)
def test_nobody_beats_the_bounds(
    history: tuple[np.ndarray, int, int], capacity_factor: float | None, capacity: str | None
) -> None:
    popularity_ULE, world_size, slots_per_rank = history
    options = PlanOptions(policies=[*CANDIDATES], capacity_factor=capacity_factor, capacity_per=capacity)
    machine = Machine(num_ranks=world_size, slots_per_rank=slots_per_rank)
    as_json = make_plan(Trace(popularity_ULE[:, None]), machine, options).as_json()
    json.dumps(as_json, allow_nan=False)
    for values in as_json["policies"].values():
        assert values["dropped"] >= as_json["bounds"]["dropped"] - 1e-9
        assert values["imbalance"] >= as_json["bounds"]["imbalance"] - 1e-9


def test_the_bounds_count_a_step_without_tokens_as_even() -> None:
    # Two ranks of one slot: expert 0's rank does it all, twice the mean; then nothing.
    trace = Trace(np.array([[[[8, 0]]], [[[0, 0]]]]))
    as_json = make_plan(trace, Machine(num_ranks=2, slots_per_rank=1), PlanOptions(policies=["static"])).as_json()
    assert as_json["bounds"]["imbalance"] == as_json["policies"]["static"]["imbalance"] == 1.5


def test_too_few_slots_are_told_before_any_policy_is_run() -> None:
    begun: list[str] = []
    with pytest.raises(ValueError, match=r"4 slots cannot hold 8 experts.*Use at least 8 slots in all"):
        make_plan(Trace(COUNTS), Machine(num_ranks=2, slots_per_rank=2), PlanOptions(), begun.append)
    assert begun == []
    make_plan(Trace(COUNTS), MACHINE, PlanOptions(policies=["static", "symi"]), begun.append)
    assert begun == ["static", "symi"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"policies": []},
            "name at least one policy of balanced, packed, swap, symi, static, static-pooled, flexmoe-10",
        ),
        ({"policies": ["best"]}, "policy must be one of 'balanced', .*, got 'best'"),
        ({"lag": -1}, "lag must be a whole number of 0 or more, got -1"),
        ({"replace_every": 0}, "replace_every must be a whole number of 1 or more, got 0"),
        ({"replace_every": "often"}, "replace_every must be a whole number of 1 or more, got 'often'"),
        ({"capacity_per": "node"}, "capacity_per must be one of 'rank', 'slot', got 'node'"),
        ({"capacity_factor": 0.0}, "capacity_factor must be a number above 0, got 0.0"),
        ({"capacity_factor": float("inf")}, "capacity_factor must be a number above 0, got inf"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanOptions(**options)


def sizes(metadata: dict[str, Any], *given: Any) -> Sizes:
    return Sizes.of(Trace(COUNTS, metadata=metadata), *(given or (None, None, None)))


def test_sizes_are_those_that_are_given_and_else_the_traces_own() -> None:
    own = {"world_size": 2, "slots_per_rank": 5, "capacity_factor": 1.25}
    assert sizes(own) == Sizes(2, 5, 1.25)
    assert sizes(own, 4, 3, 1.0) == Sizes(4, 3, 1.0)
    assert sizes({}, 4, 3, None) == sizes({**own, "capacity_factor": None}, 4, 3, None) == Sizes(4, 3, None)


def test_a_capacity_factor_of_0_is_dropless_whatever_the_run_had() -> None:
    assert sizes({"capacity_factor": 1.25}, 4, 3, 0.0) == Sizes(4, 3, None)


@pytest.mark.parametrize(
    ("metadata", "given", "message"),
    [
        ({}, (None, 3, None), r"does not say how many ranks to plan for. Add --ranks\."),
        ({"world_size": 2}, (None, None, None), r"does not say how many slots to plan for. Add --slots\."),
        ({"world_size": [2]}, (None, 3, None), r"world_size of the trace's metadata must be a whole number.*\[2\]"),
        ({"slots_per_rank": 2.5}, (2, None, None), "slots_per_rank of the trace's metadata must be a whole number"),
        ({"capacity_factor": "1"}, (2, 3, None), "capacity_factor of the trace's metadata must be a number, got '1'"),
    ],
)
def test_sizes_that_nobody_told_or_that_are_none_are_refused(
    metadata: dict[str, Any], given: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sizes(metadata, *given)
