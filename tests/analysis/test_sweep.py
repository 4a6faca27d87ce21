"""Slots and group sizes swept over a trace: what is tried, and the numbers of each point."""

from __future__ import annotations

import numpy as np
import pytest

from swiftmoe_lightning.analysis import CANDIDATES, Cluster, Machine, Point, Rules, Sweep, Trace, replay
from swiftmoe_lightning.analysis.sweep import CAPACITY_FACTORS, slot_numbers, stretches
from swiftmoe_lightning.placement import Capacity


def trace(steps: int = 12, sources: int = 4, layers: int = 2, experts: int = 8) -> Trace:
    """Skewed counts whose hot experts wander."""
    random = np.random.default_rng(0)
    logits = np.cumsum(random.normal(0, 0.3, (steps, 1, layers, experts)), 0) + random.normal(0, 1, (layers, experts))
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return Trace(random.poisson(500 * np.broadcast_to(share, (steps, sources, layers, experts))))


def sweep(recorded: Trace, ranks: int = 4, **options: float) -> Sweep:
    speeds = {name: options.pop(name) for name in ("link_bytes", "flops", "assignment_bytes") if name in options}
    machine = Machine(num_ranks=ranks, slots_per_rank=1, expert_bytes=1000, **speeds)
    return Sweep(recorded, machine, Cluster(num_ranks=ranks, **options))


@pytest.mark.parametrize(
    ("num_experts", "group_size", "expected"),
    [
        (8, 4, [2, 3, 4, 5, 6, 7]),
        # The fewest slots for 5 experts on 4 ranks are 2, and more than 5 have nothing to hold.
        (5, 4, [2, 3, 4, 5]),
        (256, 8, [32, 40, 48, 56, 64, 72]),
        (8, 16, [1, 2, 3, 4, 5, 6]),
        (8, 1, [8]),
    ],
)
def test_slots_rise_from_the_fewest_by_a_quarter_of_them(
    num_experts: int, group_size: int, expected: list[int]
) -> None:
    assert slot_numbers(num_experts, group_size) == expected


@pytest.mark.parametrize(
    ("num_steps", "num_rows", "expected"),
    [
        (50, 100, [range(50)]),
        (100, 100, [range(100)]),
        # Four stretches of 25 rows, from the first row to the last.
        (1000, 100, [range(0, 25), range(325, 350), range(650, 675), range(975, 1000)]),
        # Never shorter than the 8 rows that teach the policy, and as many that count.
        (1000, 0, [range(0, 16), range(328, 344), range(656, 672), range(984, 1000)]),
    ],
)
def test_many_steps_are_sampled_in_stretches(num_steps: int, num_rows: int, expected: list[range]) -> None:
    assert stretches(num_steps, num_rows) == expected


def test_a_point_has_the_numbers_of_its_replays() -> None:
    """One dropless replay gives the drops of every capacity factor: a capacity changes neither placement nor split."""
    recorded = trace()
    point = next(p for p in sweep(recorded).points() if (p.group_size, p.slots_per_rank) == (4, 3))
    candidate = CANDIDATES["balanced"]

    def run(capacity: Capacity | None) -> tuple[float, float, float]:
        done = replay(recorded.popularity_ULE, candidate.make(4, 3), Rules(split=candidate.split, capacity=capacity))
        total = recorded.counts_UWLE.sum()
        return done.dropped_UL.sum() / total, done.imbalance_UL.mean(), done.num_pairs_UL.mean() / 4

    assert {factor: run(Capacity(factor))[0] for factor in CAPACITY_FACTORS} == point.dropped
    assert point.dropped[1.0] > point.dropped[1.25]
    _, busiest, pairs = run(None)
    assert (point.imbalance, point.pairs) == (pytest.approx(busiest), pytest.approx(pairs))


def test_groups_are_replayed_on_the_tokens_of_their_own_ranks() -> None:
    """Two groups with opposite hot experts: each by itself is skewed, and both together are even."""
    counts_UWLE = np.ones((6, 2, 1, 2), dtype=np.int64)
    counts_UWLE[:, 0, :, 0] = counts_UWLE[:, 1, :, 1] = 7
    points = {(p.group_size, p.slots_per_rank): p for p in sweep(Trace(counts_UWLE), ranks=2).points()}
    assert points[2, 1].imbalance == 1.0
    # A rank with all experts is its own mean.
    assert points[1, 2].imbalance == 1.0
    four = np.repeat(counts_UWLE, 2, axis=1)
    skewed = {(p.group_size, p.slots_per_rank): p for p in sweep(Trace(four), ranks=4).points()}
    # A group of two has 14 and 2 assignments for its two experts, on a rank each.
    assert skewed[2, 1].imbalance == 14 / 8
    assert skewed[2, 2].imbalance < 1.05


def test_bytes_and_memory_are_those_worked_out_by_hand() -> None:
    points = sweep(trace()).points()
    assert [p.group_size for p in points if p.slots_per_rank == 4] == [2, 4]
    two, four = (p for p in points if p.slots_per_rank == 4)
    # Two phases of two layers. A rank sends half of each of its pairs' rows, and three quarters in a group of four.
    assert two.group_bytes == pytest.approx(2 * 2 * two.pairs * 1000 / 2)
    assert four.group_bytes == pytest.approx(2 * 2 * four.pairs * 1000 * 3 / 4)
    # Of 8 experts a rank owns 2000 bytes, which go to one other group.
    assert (two.across_bytes, four.across_bytes) == (2 * 2 * 2000, 0)
    assert two.sent_bytes == two.group_bytes + two.across_bytes
    # Two layers of four slots; state is eight times the weights, a quarter of it here.
    assert (two.slot_bytes, two.state_bytes, two.resident_bytes) == (8000, 32000, 40000)


def seconds(**options: float) -> dict[int, float]:
    points: list[Point] = sweep(trace(), **options).points()
    return {p.group_size: p.seconds for p in points if p.slots_per_rank == max(8 // p.group_size, 4)}


def test_time_counts_weights_then_tokens_then_the_experts() -> None:
    links = {"node_latency": 0.0, "network_latency": 0.0, "node_bytes": 1e6, "network_bytes": 1e6}
    weights = seconds(**links)
    # One rank alone sends nothing in its group, and its part of 8 experts, 2000 bytes, to each of three others.
    assert weights[1] == pytest.approx(2 * 2 * 3 * 2000 / 1e6)
    tokens = seconds(**links, assignment_bytes=10)
    assert tokens[1] == weights[1]
    # About 500 assignments of a rank and layer; three quarters leave the rank, four times a step.
    assert tokens[4] - weights[4] == pytest.approx(4 * 2 * 500 * 10 * 3 / 4 / 1e6, rel=0.02)
    experts = seconds(**links, link_bytes=1e6, flops=1e9)
    # Three operations a byte of weights; a rank alone has the mean load.
    assert experts[1] - weights[1] == pytest.approx(2 * 500 * 3000 / 1e9, rel=0.02)
    far = seconds(**links | {"network_bytes": 1e3}, ranks_per_node=2)
    assert far[4] > 100 * weights[4]


def test_without_ranks_only_one_group_of_all_is_known() -> None:
    one_source = Trace(trace().counts_UWLE.sum(1, keepdims=True))
    assert (sweep(one_source).group_sizes, sweep(one_source).unknown_sizes) == ([4], [1, 2])
    assert (sweep(trace()).group_sizes, sweep(trace()).unknown_sizes) == ([1, 2, 4], [])
    # Four sources are the tokens of eight ranks' two or four groups, not of eight.
    assert sweep(trace(), ranks=8).unknown_sizes == [1]


def test_a_long_trace_is_replayed_in_part() -> None:
    long = Trace(np.ones((1000, 1, 6, 64), dtype=np.int64))
    told: list[str] = []
    sampled = sweep(long, ranks=16)
    assert sampled.layers == [0, 2, 3, 5]
    assert [len(rows) for rows in sampled.stretches] == [125] * 4
    short = sweep(trace(), ranks=4)
    short.points(told.append)
    assert told == ["groups of 1", "groups of 2", "groups of 4"]
