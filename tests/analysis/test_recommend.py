"""The rule that recommends, on points made up for it."""

from __future__ import annotations

from typing import Any

import pytest

from swiftmoe_lightning.analysis import Point, recommend
from swiftmoe_lightning.analysis.recommend import knee


def point(slots: int, imbalance: float, group_size: int = 4, **changes: Any) -> Point:
    numbers = {
        "dropped": {1.0: 0.05, 1.25: 0.008, 1.5: 0.0},
        "pairs": float(slots),
        "group_bytes": 1e6,
        "across_bytes": 0.0,
        "slot_bytes": slots * 1e9,
        "state_bytes": 1e9,
        "seconds": 0.001,
    }
    return Point(group_size=group_size, slots_per_rank=slots, imbalance=imbalance, **numbers | changes)


@pytest.mark.parametrize(
    ("imbalances", "expected"),
    [
        # Each of the first steps buys 1 % of the mean load or more.
        ([1.5, 1.2, 1.05, 1.045, 1.044], 3),
        ([1.004, 1.003, 1.002], 1),
        ([1.5, 1.4, 1.3], 3),
        # A step that buys nothing stands before one that buys much.
        ([1.5, 1.5, 1.2, 1.2], 3),
        # Noise: the last is better than the second by more than 1 %, but not than the first.
        ([1.05, 1.06, 1.045], 1),
        # Two steps together must buy twice as much.
        ([1.019, 1.015, 1.0], 1),
        ([1.021, 1.015, 1.0], 3),
        ([1.02, 1.0101, 1.0002], 1),
        ([2.0], 1),
    ],
)
def test_the_knee_is_the_fewest_slots_above_which_no_step_is_worth_it(imbalances: list[float], expected: int) -> None:
    assert knee([point(slots, imbalance) for slots, imbalance in enumerate(imbalances, 1)]).slots_per_rank == expected


@pytest.mark.parametrize(("most_dropped", "expected"), [(0.05, 1.0), (0.01, 1.25), (0.001, 1.5), (0.0, 1.5)])
def test_the_smallest_capacity_that_drops_no_more_than_allowed_is_taken(most_dropped: float, expected: float) -> None:
    assert recommend([point(2, 1.1)], most_dropped, 1e12).capacity_factor == expected


def test_where_every_capacity_drops_too_much_nothing_is_dropped() -> None:
    best = recommend([point(2, 1.5, dropped={1.0: 0.3, 2.0: 0.02})], 0.01, 1e12)
    assert best.settings == {"expert_parallel_size": 4, "slots_per_rank": 2, "capacity_factor": None}
    assert "No capacity factor up to 2 drops at most 1.00% of the assignments (2.00%)." in best.sentences([best.point])


def test_the_group_with_the_least_time_is_taken_and_the_larger_on_ties() -> None:
    points = [
        point(4, 1.2, 2, seconds=0.003),
        point(5, 1.1, 2, seconds=0.002),
        point(2, 1.3, 4, seconds=0.002),
        point(3, 1.295, 4, seconds=0.0001),
    ]
    best = recommend(points, 0.01, 1e12)
    # In groups of 4 the third slot buys too little, however fast it is said to be.
    assert [(knee.group_size, knee.slots_per_rank) for knee in best.knees] == [(2, 5), (4, 2)]
    assert (best.point.group_size, best.point.slots_per_rank) == (4, 2)


def test_what_does_not_fit_the_memory_is_left_out() -> None:
    points = [point(slots, imbalance) for slots, imbalance in ((2, 1.5), (3, 1.2), (4, 1.0))]
    assert recommend(points, 0.01, 4e9).point.slots_per_rank == 3
    with pytest.raises(ValueError, match=r"2 slots in groups of 4 need least, 3 GB of a rank .* 2 GB .*--gpu-gbytes"):
        recommend(points, 0.01, 2e9)


def test_each_choice_has_its_reason() -> None:
    points = [point(4, 1.3, 2, seconds=0.004), point(2, 1.2), point(3, 1.05), point(4, 1.049)]
    assert recommend(points, 0.01, 1e12).sentences(points) == [
        "Take expert_parallel_size=4, slots_per_rank=3, capacity_factor=1.25.",
        "With 3 slots the busiest rank has 1.050 times the mean load; 4 would make it 1.049.",
        "Capacity factor 1.25 drops 0.80% of the assignments, at most 1.00%; 1 would drop 5.00%.",
        "Groups of 4 take the least time, 1 ms a step; groups of 2 with 4 slots would take 4 ms.",
    ]
    alone = [point(2, 1.0, dropped={1.0: 0.0})]
    assert recommend(alone, 0.01, 1e12).sentences(alone)[1:] == [
        "With 2 slots the busiest rank has 1.000 times the mean load, and they are the fewest that hold all experts; "
        "more were not tried.",
        "Capacity factor 1 drops 0.00% of the assignments, at most 1.00%, and is the smallest that was tried.",
        "No other group size was compared.",
    ]
