from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.analysis import Machine
from swiftmoe_lightning.analysis.cost import (
    busiest_phase,
    paper_bytes,
    paper_step_seconds,
    phase_bytes,
    step_seconds,
)
from swiftmoe_lightning.placement import Placement, plan_collection, plan_distribution
from tests.placement.cases import placements

# Rank 0 has expert 0 twice, rank 1 has experts 0, 1 and 2: P = 4.
LOPSIDED = Placement(np.array([0, 0, 0, 0, 1, 2]), 3, 2)


def machine(num_ranks: int = 2, slots_per_rank: int = 3, **options: Any) -> Machine:
    return Machine(num_ranks=num_ranks, slots_per_rank=slots_per_rank, expert_bytes=100, **options)


# The paper's example, GPT3-175B: 64 experts of 3.375 GB of gradients and as much of weights, 2048 ranks of 2 slots,
# 400 Gb/s.
PAPERS = Machine(num_ranks=2048, slots_per_rank=2, expert_bytes=3_375_000_000, link_bytes=50e9, flops=1e15)


def test_a_phase_sends_what_does_not_stay_on_its_rank() -> None:
    assert phase_bytes(4, machine()) == 200
    assert phase_bytes(6, machine(num_ranks=4)) == 450
    assert phase_bytes(3, machine(num_ranks=1)) == 0


def test_the_papers_way_sends_gradients_by_all_reduce_and_weights_to_every_slot() -> None:
    # Expert 0 is on both ranks: its all-reduce sends 2 * 100. Then each rank fetches its half of the experts
    # that it does not have: rank 0 of 1 and 2. Weights: of every rank's three slots the other rank owns half.
    assert paper_bytes(4, 3, machine()) == 2 * 100 + 2 * 50 + 6 * 50
    assert paper_bytes(3, 3, machine(num_ranks=1)) == 0


def test_the_papers_example_comes_out() -> None:
    # (sN - s) / N * G / BW with a replica in every slot: 2 * 2047 / 2048 * 3.375 / 50 s for each of the phases.
    phase = 2 * 2047 / 2048 * 3.375 / 50
    assert phase == pytest.approx(0.13493, abs=1e-5)
    assert paper_step_seconds(0, PAPERS) == pytest.approx(2 * phase)
    # All ranks together send N times as much weight; the gradients' way is no longer than the bound.
    in_all_slots = Placement(np.repeat(np.arange(64), 64), 64, 2048)
    assert busiest_phase(in_all_slots) == pytest.approx(2047 / 2048)
    two_a_rank = Placement(np.tile(np.arange(64), 64), 64, 2048)
    assert busiest_phase(two_a_rank) == pytest.approx(2 * 2047 / 2048)
    assert phase_bytes(4096, PAPERS) == pytest.approx(2048 * phase * PAPERS.link_bytes)
    assert step_seconds(0, busiest_phase(two_a_rank), 0, PAPERS) == pytest.approx(2 * phase)


def test_the_busiest_rank_of_a_phase_is_bound_by_sending_or_by_receiving() -> None:
    # Rank 1 sends its three gradients' other halves: 3 / 2. As the owner it gets half of rank 0's one.
    assert busiest_phase(LOPSIDED) == 1.5
    # Four ranks of one slot, one expert: each sends 3 / 4, and receives a quarter from each of 3.
    assert busiest_phase(Placement(np.zeros(4), 1, 4)) == 0.75
    assert busiest_phase(Placement(np.array([0, 1]), 2, 1)) == 0
    # Ranks have 1, 1, 1 and 4 of the pairs: the last sends 4 * 3 / 4, the others receive 6 / 4 at the most.
    assert busiest_phase(Placement(np.array([0] * 12 + [0, 1, 2, 3]), 4, 4)) == 3.0


@settings(max_examples=100, deadline=None)
@given(placements(), st.integers(1, 4), st.integers(1, 5))
def test_bytes_are_the_elements_that_training_sends_where_ranks_divide_the_rows(
    placement: Placement, rows_of_rank: int, elements: int
) -> None:
    world_size = placement.world_size
    row_elements = [(rows_of_rank * world_size, elements)]
    expert = rows_of_rank * world_size * elements
    costs = Machine(num_ranks=world_size, slots_per_rank=placement.slots_per_rank, expert_bytes=expert)
    for plan in (plan_collection(placement, row_elements), plan_distribution(placement, row_elements)):
        sent_W = [plan.elements_sent(rank) for rank in range(world_size)]
        splits_WW = np.array([plan.receive_splits(rank) for rank in range(world_size)])
        received_W = splits_WW.sum(1) - np.diag(splits_WW)
        assert sum(sent_W) == pytest.approx(phase_bytes(placement.num_pairs_W.sum(), costs))
        assert max(*sent_W, *received_W) == pytest.approx(busiest_phase(placement) * expert)


@settings(max_examples=100, deadline=None)
@given(placements())
def test_our_phases_never_send_more_than_the_papers(placement: Placement) -> None:
    costs = machine(placement.world_size, placement.slots_per_rank)
    num_pairs = int(placement.num_pairs_W.sum())
    assert 2 * phase_bytes(num_pairs, costs) <= paper_bytes(num_pairs, placement.num_experts, costs) + 1e-9


def test_a_steps_seconds_are_compute_phases_tokens_and_moved_state() -> None:
    # 40 assignments of 300 operations at 1000 a second; 2 phases of 1.5 * 100 bytes; 40 assignments of 10 bytes, sent 4
    # times, of which half leave the rank; 3 experts' state of 800 and weights of 100, over two ranks; all at 10 bytes a
    # second.
    costs = machine(flops=1000.0, link_bytes=10.0, assignment_bytes=10)
    assert step_seconds(40, 1.5, 3, costs) == pytest.approx(12 + 30 + 80 + 135)
    assert step_seconds(40, 1.5, 0, costs) == pytest.approx(12 + 30 + 80)
    given_sizes = machine(flops=1000.0, link_bytes=10.0, assignment_flops=50.0, state_bytes=0)
    assert step_seconds(40, 1.5, 3, given_sizes) == pytest.approx(2 + 30 + 15)
    # The paper's: 3 slots * 1 / 2 of the ranks, twice; no state moves.
    assert paper_step_seconds(40, costs) == pytest.approx(12 + 30 + 80)


def test_on_one_rank_there_is_nothing_to_send() -> None:
    costs = machine(num_ranks=1, flops=1000.0, link_bytes=10.0, assignment_bytes=10)
    assert paper_step_seconds(40, costs) == pytest.approx(12)
    assert step_seconds(40, busiest_phase(Placement(np.arange(3), 3, 1)), 0, costs) == pytest.approx(12)


def test_without_speeds_no_seconds_are_told() -> None:
    assert step_seconds(40, 1.5, 3, machine()) is None
    assert paper_step_seconds(40, machine()) is None


def test_an_experts_state_is_eight_times_its_gradient_unless_it_is_given() -> None:
    # 16 bytes a parameter of 2.
    assert machine().moved_state_bytes == 800
    assert machine(state_bytes=0).moved_state_bytes == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ranks": 0}, "num_ranks must be a whole number of 1 or more, got 0"),
        ({"slots_per_rank": 1.5}, "slots_per_rank must be a whole number of 1 or more, got 1.5"),
        ({"expert_bytes": 0}, "expert_bytes must be a whole number of 1 or more, got 0"),
        ({"state_bytes": -1}, "state_bytes must be a whole number of 0 or more, got -1"),
        ({"assignment_bytes": -1}, "assignment_bytes must be a whole number of 0 or more, got -1"),
        ({"link_bytes": 0.0, "flops": 1.0}, "link_bytes must be a number above 0, got 0.0"),
        ({"link_bytes": 1.0, "flops": float("inf")}, "flops must be a number above 0, got inf"),
        ({"assignment_flops": float("nan")}, "assignment_flops must be a number above 0, got nan"),
        ({"link_bytes": 1.0}, "Give both link_bytes and flops, or none"),
        ({"flops": 1.0}, "Give both link_bytes and flops, or none"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Machine(**{"num_ranks": 2, "slots_per_rank": 3, **options})
