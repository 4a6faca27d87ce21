from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.analysis import CANDIDATES, Replay, Rules, replay
from swiftmoe_lightning.placement import (
    CAUSES,
    Capacity,
    Forecast,
    Placement,
    PlacementPolicy,
    make_policy,
    plan_dispatch,
)
from tests.analysis.baselines.cases import histories


class Table(PlacementPolicy):
    """Two experts on two ranks of two slots: all replicas but one for the hotter expert, two each on ties."""

    TABLES = ([0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 1, 1])

    def place(self, forecast: Forecast) -> list[Placement]:
        popularity_LE = forecast.popularity_LE
        signs = np.sign(popularity_LE[:, 1] - popularity_LE[:, 0]).astype(int)
        return self.placements_of([self.TABLES[{0: 0, -1: 1, 1: 2}[sign]] for sign in signs.tolist()], 2)


# [3 steps, 1 layer, 2 experts]: the first one is hot, then the second one, then the first again.
TRACE = np.array([[[12, 4]], [[2, 14]], [[9, 3]]])


def run(lag: int = 1, split: str = "uniform", capacity: Capacity | None = None, **rules: Any) -> Replay:
    return replay(TRACE, Table(2, 2), Rules(split=split, capacity=capacity, lag=lag, **rules))


@pytest.mark.parametrize(
    ("lag", "replicas", "wanted_loads", "pairs", "moved"),
    [
        # From the step itself: [0 0 | 0 1], [0 1 | 1 1], [0 0 | 0 1]. Expert 0's twelve: eight on rank 0's two slots;
        # then expert 1's fourteen: 4 (floored) on rank 0 and ten on rank 1.
        (0, [[3, 1], [1, 3], [3, 1]], [[8, 8], [6, 10], [6, 6]], [3, 3, 3], [0, 1, 1]),
        # From the step before; the first step has none: [0 1 | 0 1], [0 0 | 0 1], [0 1 | 1 1].
        (1, [[2, 2], [3, 1], [1, 3]], [[8, 8], [1, 15], [10, 2]], [4, 3, 3], [0, 0, 1]),
        # From the one before that: two steps with the first placement, then [0 0 | 0 1].
        (2, [[2, 2], [2, 2], [3, 1]], [[8, 8], [8, 8], [6, 6]], [4, 4, 3], [0, 0, 0]),
        # No step is planned from an earlier one.
        (3, [[2, 2], [2, 2], [2, 2]], [[8, 8], [8, 8], [5, 7]], [4, 4, 4], [0, 0, 0]),
    ],
)
def test_a_step_is_served_by_the_plan_from_lag_steps_before(
    lag: int, replicas: list[Any], wanted_loads: list[Any], pairs: list[int], moved: list[int]
) -> None:
    replayed = run(lag)
    assert replayed.replicas_ULE[:, 0].tolist() == replicas
    assert replayed.wanted_ULW[:, 0].tolist() == replayed.load_ULW[:, 0].tolist() == wanted_loads
    assert replayed.num_pairs_UL[:, 0].tolist() == pairs
    assert replayed.moved_UL[:, 0].tolist() == moved
    assert replayed.dropped_UL.tolist() == [[0], [0], [0]]
    assert replayed.imbalance_UL[:, 0].tolist() == [2 * max(row) / sum(row) for row in wanted_loads]


def test_a_budget_for_each_rank_is_shared_by_its_slots() -> None:
    # Budgets are 8, 8 and 6 a rank: of [[8, 8], [1, 15], [10, 2]] ranks compute these.
    replayed = run(capacity=Capacity(1.0))
    assert replayed.load_ULW[:, 0].tolist() == [[8, 8], [1, 8], [6, 2]]
    assert replayed.dropped_UL[:, 0].tolist() == [0, 7, 4]
    assert replayed.imbalance_UL[:, 0].tolist() == [1.0, 16 / 9, 1.5]


def test_a_budget_for_each_slot_is_not() -> None:
    # Budgets are 4, 4 and 3 a slot. Slots want [6 2 | 6 2], [0.67 0.67 | 0.67 14], [9 1 | 1 1].
    replayed = run(capacity=Capacity(1.0, "slot"))
    assert replayed.load_ULW[:, 0].tolist() == [[6, 6], [1, 5], [4, 2]]
    assert replayed.dropped_UL[:, 0].tolist() == [4, 10, 6]


def test_losses_are_split_by_cause() -> None:
    replayed = run(capacity=Capacity(1.0))
    # 7 of 16 and 4 of 12 were dropped. Under these placements 6 and 3 must be, for the hot expert is on one rank alone;
    # the equal parts added one each. An oracle drops nothing.
    assert replayed.achieved == pytest.approx((7 / 16 + 4 / 12) / 3)
    losses = {"split": (1 / 16 + 1 / 12) / 3, "placement": 0, "prediction": (6 / 16 + 3 / 12) / 3}
    assert replayed.losses == pytest.approx({**losses, "floor": 0, "rounding": 0}, abs=1e-12)


def test_the_busiest_ranks_part_of_a_phase_is_kept_for_every_step() -> None:
    # Ranks have two experts each, then one and two: the second sends two half gradients away, 2 / 2.
    assert run().busiest_UL.tolist() == [[1.0], [1.0], [1.0]]
    assert replay(TRACE, Table(2, 2), Rules(lag=0)).num_pairs_UL.tolist() == [[3], [3], [3]]
    one_rank = replay(TRACE, make_policy("static", 1, 2), Rules())
    assert one_rank.busiest_UL.tolist() == [[0], [0], [0]]


class Remembers(PlacementPolicy):
    """Uniform replicas; records the popularity of each call."""

    def __init__(self, world_size: int, slots_per_rank: int) -> None:
        super().__init__(world_size, slots_per_rank)
        self.calls: list[list[list[float]]] = []

    def place(self, forecast: Forecast) -> list[Placement]:
        popularity_LE = forecast.popularity_LE
        self.calls.append(popularity_LE.tolist())
        return [Placement.uniform(popularity_LE.shape[1], self.world_size, self.slots_per_rank)] * len(popularity_LE)


STEPS = np.array([[[1, 2], [9, 0]], [[3, 4], [0, 9]], [[5, 6], [8, 8]], [[7, 8], [1, 1]], [[9, 9], [2, 2]]])


@pytest.mark.parametrize(
    ("interval", "calls"),
    [
        (1, [[[1, 2], [9, 0]], [[3, 4], [0, 9]], [[5, 6], [8, 8]], [[7, 8], [1, 1]]]),
        (2, [[[4, 6], [9, 9]], [[12, 14], [9, 9]]]),
        (3, [[[9, 12], [17, 17]]]),
        (5, []),
    ],
)
def test_an_interval_of_n_places_by_the_sums_of_n_steps(interval: int, calls: list[Any]) -> None:
    policy = Remembers(2, 2)
    replay(STEPS, policy, Rules(interval=interval))
    # The first call is before any step; the last step is placed for no other.
    assert policy.calls == [[[0, 0], [0, 0]], *calls]


def test_auto_moves_for_fewer_pairs_or_for_uneven_loads_and_else_stays() -> None:
    # At first [0 1 | 0 1], even for any loads. `Table` needs one pair less for the first step's: [0 0 | 0 1]. That is
    # even where expert 0 has nearly all, so it stays, though `Table` would take [0 1 | 1 1] for the second step; for
    # the third, of expert 1 alone, it is not: `Table` gets its way.
    steps = np.array([[[30, 2]], [[999, 1001]], [[0, 16]], [[4, 4]]])
    replayed = replay(steps, Table(2, 2), Rules(interval="auto"))
    assert replayed.load_ULW[:, 0].tolist()[0] == [16, 16]
    assert replayed.replicas_ULE[:, 0].tolist() == [[2, 2], [3, 1], [3, 1], [1, 3]]
    each_time = replay(steps, Table(2, 2), Rules())
    assert each_time.replicas_ULE[:, 0].tolist() == [[2, 2], [3, 1], [1, 3], [1, 3]]


@pytest.mark.parametrize(("lag", "moved"), [(1, [0, 0, 0, 0]), (2, [0, 0, 0, 1]), (3, [0, 0, 0, 0, 1, 1])])
def test_under_a_lag_auto_stays_and_does_not_go_back(lag: int, moved: list[int]) -> None:
    # [0 0 | 0 1] and [0 1 | 1 1] are both even for these loads, and have one pair less than the first placement. Until
    # a step with one of them has been seen, each older step asks for one of the two; then nothing moves again.
    steps = np.array([[[1001, 999]], [[999, 1001]]] * 6)
    replayed = replay(steps, Table(2, 2), Rules(interval="auto", lag=lag))
    assert replayed.moved_UL[:, 0].tolist() == moved + [0] * (12 - len(moved))


@st.composite
def dense_histories(draw: Any) -> tuple[np.ndarray, int, int]:
    """Every layer of every step has tokens."""
    popularity_ULE, world_size, slots_per_rank = draw(histories())
    return popularity_ULE + np.eye(1, popularity_ULE.shape[2], dtype=np.int64), world_size, slots_per_rank


CAPACITIES = [None, Capacity(1.0), Capacity(0.7, "slot"), Capacity(1.5, "slot")]


@pytest.mark.parametrize("name", ["static", "symi"])
@given(
    history=dense_histories(),
    capacity=st.sampled_from(CAPACITIES),
    split=st.sampled_from(["uniform", "balanced"]),
    lag=st.integers(0, 3),
)
@settings(max_examples=100, deadline=None)
def test_a_policy_without_the_uniform_fallback_is_replayed_as_the_plain_loop_would(
    name: str, history: tuple[np.ndarray, int, int], capacity: Capacity | None, split: str, lag: int
) -> None:
    popularity_ULE, world_size, slots_per_rank = history
    policy = make_policy(name, world_size, slots_per_rank)
    replayed = replay(popularity_ULE, policy, Rules(split=split, capacity=capacity, lag=lag))
    nothing_LE = np.zeros_like(popularity_ULE[0])
    before = None
    for step, popularity_LE in enumerate(popularity_ULE):
        placements = policy.place(Forecast.of(popularity_ULE[step - lag] if step >= lag else nothing_LE))
        for layer, placement in enumerate(placements):
            # All from the last rank: where tokens come from makes no difference to loads.
            counts_WE = np.zeros((world_size, popularity_LE.shape[1]), dtype=np.int64)
            counts_WE[-1] = popularity_LE[layer]
            plan = plan_dispatch(counts_WE, placement, split, capacity)
            assert replayed.replicas_ULE[step, layer].tolist() == placement.replica_counts_E.tolist()
            assert replayed.wanted_ULW[step, layer].tolist() == plan.wanted_W.tolist()
            assert replayed.load_ULW[step, layer].tolist() == plan.load_W.tolist()
            assert replayed.dropped_UL[step, layer] == plan.num_dropped_tokens
            assert replayed.num_pairs_UL[step, layer] == placement.num_pairs_W.sum()
            assert replayed.moved_UL[step, layer] == (before[layer].num_moved(placement) if before else 0)
        before = placements


@pytest.mark.parametrize("name", CANDIDATES)
@given(
    history=histories().filter(lambda history: history[0].any()),
    capacity=st.sampled_from(CAPACITIES),
    interval=st.sampled_from([1, 2, "auto"]),
    lag=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_every_candidate_runs_on_any_trace_and_its_losses_add_up(
    name: str, history: tuple[np.ndarray, int, int], capacity: Capacity | None, interval: int | str, lag: int
) -> None:
    popularity_ULE, world_size, slots_per_rank = history
    candidate = CANDIDATES[name]
    policy = candidate.make(world_size, slots_per_rank)
    replayed = replay(
        popularity_ULE, policy, Rules(split=candidate.split, capacity=capacity, interval=interval, lag=lag)
    )
    assert (replayed.wanted_ULW.sum(2) == popularity_ULE.sum(2)).all()
    assert (replayed.load_ULW <= replayed.wanted_ULW).all()
    assert replayed.dropped_UL.any() <= (capacity is not None)
    assert (replayed.replicas_ULE.sum(2) == world_size * slots_per_rank).all()
    assert list(replayed.losses) == list(replayed.bounds) == list(CAUSES)
    values = [replayed.achieved, *replayed.bounds.values()]
    for above, below in zip(values, values[1:], strict=False):
        assert above >= below - 1e-9
    assert sum(replayed.losses.values()) + replayed.bounds["rounding"] == pytest.approx(replayed.achieved, abs=1e-9)


EDGES = {
    "one step": ((1, 2, 4), 2, 3),
    "one layer": ((4, 1, 4), 2, 3),
    "one expert": ((4, 2, 1), 3, 2),
    "one rank": ((4, 2, 5), 1, 6),
    "one rank with one slot": ((3, 1, 1), 1, 1),
    "more experts than ranks": ((4, 2, 9), 2, 5),
    "fewer experts than ranks": ((4, 2, 3), 8, 1),
    "as many slots as experts": ((4, 2, 6), 3, 2),
}


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_runs_on_the_smallest_traces(name: str, edge: str, capacity_factor: float | None) -> None:
    shape, world_size, slots_per_rank = EDGES[edge]
    popularity_ULE = np.random.default_rng(0).integers(0, 9, shape)
    popularity_ULE[0, 0, 0] = 5
    # Its last step routes nothing.
    popularity_ULE[1:][-1:] = 0
    candidate = CANDIDATES[name]
    capacity = None if capacity_factor is None else Capacity(capacity_factor, candidate.capacity_per)
    rules = Rules(split=candidate.split, capacity=capacity, lag=0 if candidate.is_oracle else 1)
    replayed = replay(popularity_ULE, candidate.make(world_size, slots_per_rank), rules)
    assert (replayed.load_ULW.sum(2) + replayed.dropped_UL == popularity_ULE.sum(2)).all()
    if capacity_factor is None:
        assert replayed.dropped_UL.sum() == 0
    if world_size == 1:
        assert (replayed.imbalance_UL == 1).all()
        # Nothing to pool over, so a single rank drops nothing; its slots may.
        assert candidate.capacity_per == "slot" or not replayed.dropped_UL.any()
    if len(popularity_ULE) > 1:
        assert (replayed.imbalance_UL[-1] == 1).all()


@pytest.mark.parametrize("name", ["balanced", "packed", "symi"])
def test_a_step_without_tokens_leaves_everything_where_it_is(name: str) -> None:
    popularity_ULE = np.random.default_rng(0).integers(0, 99, (6, 2, 6))
    popularity_ULE[2] = 0
    with_gap = replay(popularity_ULE, make_policy(name, 4, 3), Rules())
    without = replay(np.delete(popularity_ULE, 2, 0), make_policy(name, 4, 3), Rules())
    assert with_gap.load_ULW[3:].tolist() == without.load_ULW[2:].tolist()
    assert with_gap.replicas_ULE[2].tolist() == with_gap.replicas_ULE[3].tolist() == without.replicas_ULE[2].tolist()
    assert with_gap.load_ULW[2].sum() == 0


@pytest.mark.parametrize("capacity", [None, Capacity(1.0)])
def test_the_only_steps_with_tokens_have_bounds_however_long_the_trace(capacity: Capacity | None) -> None:
    popularity_ULE = np.zeros((500, 1, 2), dtype=np.int64)
    popularity_ULE[7] = [12, 4]
    replayed = replay(popularity_ULE, Table(2, 2), Rules(split="uniform", capacity=capacity))
    short = replay(popularity_ULE[7:8], Table(2, 2), Rules(split="uniform", capacity=capacity))
    assert (replayed.achieved, replayed.losses, replayed.bounds) == (short.achieved, short.losses, short.bounds)


def test_of_a_long_trace_some_steps_have_bounds_from_its_first_to_its_last() -> None:
    # Uneven in the first and the last step alone; of 1000 steps 200 have bounds.
    popularity_ULE = np.full((1000, 1, 2), 8)
    popularity_ULE[[0, -1], 0] = [16, 0]
    replayed = replay(popularity_ULE, make_policy("static", 2, 1), Rules())
    assert replayed.achieved == pytest.approx((198 * 1 + 2 * 2) / 200)
