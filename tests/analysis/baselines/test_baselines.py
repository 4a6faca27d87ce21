import numpy as np
import pytest
from hypothesis import given, settings

from swiftmoe_lightning.analysis import CANDIDATES
from swiftmoe_lightning.placement import Forecast
from swiftmoe_lightning.placement.policies import check_placements
from tests.analysis.baselines.cases import histories

BASELINES = {name: candidate.make for name, candidate in CANDIDATES.items() if candidate.label == "re-implementation"}


def test_other_systems_are_named_and_run_as_their_authors_do():
    assert list(BASELINES) == ["flexmoe-10", "flexmoe-50", "flexmoe-100", "eplb", "lpt", "shadowing"]
    assert [BASELINES[f"flexmoe-{n}"](2, 2).interval for n in (10, 50, 100)] == [10, 50, 100]
    assert [name for name, c in CANDIDATES.items() if c.is_oracle] == ["shadowing", "oracle"]
    assert [name for name, c in CANDIDATES.items() if c.moves_state] == [
        "flexmoe-10",
        "flexmoe-50",
        "flexmoe-100",
        "lpt",
    ]
    slot_budget = ["symi", "static", "flexmoe-10", "flexmoe-50", "flexmoe-100"]
    assert [name for name, c in CANDIDATES.items() if c.capacity_per == "slot"] == slot_budget


def replay(name, steps_ULE, world_size, slots_per_rank):
    policy = BASELINES[name](world_size, slots_per_rank)
    # Every step ten times: "flexmoe-10" then revises.
    placements_of_calls = [policy.place(Forecast.of(popularity_LE)) for popularity_LE in steps_ULE for _ in range(10)]
    for placements in placements_of_calls:
        check_placements(policy, placements, *steps_ULE.shape[1:])
    return placements_of_calls


@pytest.mark.parametrize("name", BASELINES)
@given(history=histories())
@settings(max_examples=60, deadline=None)
def test_every_baseline_keeps_every_expert_fills_all_slots_and_follows_from_its_history(name, history):
    steps_ULE, world_size, slots_per_rank = history
    placements_of_calls = replay(name, *history)
    assert placements_of_calls == replay(name, *history)
    for placement in (placement for placements in placements_of_calls for placement in placements):
        assert placement.replica_counts_E.min() >= 1
        assert placement.replica_counts_E.sum() == world_size * slots_per_rank


@pytest.mark.parametrize("name", BASELINES)
@given(history=histories())
@settings(max_examples=40, deadline=None)
def test_no_layer_sees_another_one(name, history):
    steps_ULE, world_size, slots_per_rank = history
    together = replay(name, *history)
    for layer in range(steps_ULE.shape[1]):
        alone = replay(name, steps_ULE[:, layer : layer + 1], world_size, slots_per_rank)
        assert [placements[0] for placements in alone] == [placements[layer] for placements in together]


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("num_experts", "world_size", "slots_per_rank"),
    [(2, 5, 1), (3, 8, 2), (8, 4, 2), (7, 4, 2), (5, 1, 5), (1, 1, 1), (1, 3, 2), (3, 2, 6)],
)
def test_edge_sizes_work_with_any_popularity(name, num_experts, world_size, slots_per_rank):
    one_hot = np.eye(num_experts, dtype=np.int64)[-1:] * 999
    fractions = np.full((1, num_experts), 1 / 3)
    for popularity in (one_hot, np.zeros_like(one_hot), np.arange(num_experts)[None], fractions):
        replay(name, popularity[None], world_size, slots_per_rank)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(("num_experts", "slots_per_rank"), [(256, 2), (1500, 2)])
def test_a_thousand_ranks_are_placed(name, num_experts, slots_per_rank):
    popularity = np.random.default_rng(0).zipf(1.5, (1, 1, num_experts)).clip(max=10**7)
    replay(name, popularity, 1000, slots_per_rank)


@pytest.mark.parametrize("name", BASELINES)
def test_popularity_is_left_as_it_was(name):
    popularity_LE = np.array([[9, 0, 3, 1]])
    replay(name, popularity_LE[None], 2, 3)
    assert popularity_LE.tolist() == [[9, 0, 3, 1]]


@pytest.mark.parametrize("name", BASELINES)
def test_more_experts_than_slots_is_an_error_with_the_fix(name):
    with pytest.raises(ValueError, match="4 slots cannot hold 5 experts.*Use at least 5 slots"):
        BASELINES[name](2, 2).place(Forecast.of(np.ones((1, 5), dtype=np.int64)))
