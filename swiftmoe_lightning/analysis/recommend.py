"""Which group size, number of slots and capacity factor to take from a sweep, and why. g ranks of a group, s slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from swiftmoe_lightning.analysis.report.page_text import bytes_text, seconds_text
from swiftmoe_lightning.analysis.sweep import Point

# The next number of slots is worth its memory if it brings the busiest rank's load down by this share of the mean.
LEAST_GAIN: Final = 0.01


@dataclass(frozen=True)
class Recommendation:
    """What to take.

    Attributes:
        point: the group size and the number of slots.
        capacity_factor: None is dropless.
        knees: one point for each group size that fits, at its own number of slots.
        most_dropped: the largest share of assignments that may be dropped.
    """

    point: Point
    capacity_factor: float | None
    knees: tuple[Point, ...]
    most_dropped: float

    @property
    def settings(self) -> dict[str, Any]:
        """Options: the first two of `SwiftMoEStrategy`, the last of `MoE`."""
        return {
            "expert_parallel_size": self.point.group_size,
            "slots_per_rank": self.point.slots_per_rank,
            "capacity_factor": self.capacity_factor,
        }

    def sentences(self, points: Sequence[Point]) -> list[str]:
        """What to take, and the reason for each choice.

        Args:
            points: of the sweep, fewest slots first.
        """
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return [f"Take {settings}.", self._why_slots(points), self._why_capacity(), self._why_group()]

    def _why_slots(self, points: Sequence[Point]) -> str:
        chosen = self.point
        same_group = [point for point in points if point.group_size == chosen.group_size]
        more = [point for point in same_group if point.slots_per_rank > chosen.slots_per_rank]
        now = f"With {chosen.slots_per_rank} slots the busiest rank has {chosen.imbalance:.3f} times the mean load"
        if chosen is same_group[0]:
            now += ", and they are the fewest that hold all experts"
        if not more:
            return f"{now}; more were not tried."
        return f"{now}; {more[0].slots_per_rank} would make it {more[0].imbalance:.3f}."

    def _why_capacity(self) -> str:
        dropped, limit = self.point.dropped, f"{self.most_dropped:.2%}"
        if self.capacity_factor is None:
            factor, least = min(dropped.items(), key=lambda entry: entry[1])
            return f"No capacity factor up to {factor:g} drops at most {limit} of the assignments ({least:.2%})."
        smaller = [factor for factor in dropped if factor < self.capacity_factor]
        now = f"Capacity factor {self.capacity_factor:g} drops {dropped[self.capacity_factor]:.2%} of the assignments"
        if not smaller:
            return f"{now}, at most {limit}, and is the smallest that was tried."
        return f"{now}, at most {limit}; {smaller[-1]:g} would drop {dropped[smaller[-1]]:.2%}."

    def _why_group(self) -> str:
        chosen = self.point
        others = sorted((knee for knee in self.knees if knee is not chosen), key=lambda knee: knee.seconds)
        if not others:
            return "No other group size was compared."
        return (
            f"Groups of {chosen.group_size} take the least time, {seconds_text(chosen.seconds)} a step; groups of "
            f"{others[0].group_size} with {others[0].slots_per_rank} slots would take "
            f"{seconds_text(others[0].seconds)}."
        )


def recommend(points: Sequence[Point], most_dropped: float, most_bytes: float) -> Recommendation:
    """The rule, in three steps.

    1. Slots: for each group size the knee, see `knee`.
    2. Group size: of the knees the one that takes the least time a step; on ties the larger group.
    3. Capacity: the smallest factor that drops no more than is allowed there; dropless if none does.

    Args:
        points: fewest slots first.
        most_dropped: the largest share of assignments that may be dropped.
        most_bytes: a rank's memory for experts; points that need more are left out.

    Raises:
        ValueError: where no point fits.
    """
    fitting = [point for point in points if point.resident_bytes <= most_bytes]
    if not fitting:
        least = min(points, key=lambda point: point.resident_bytes)
        raise ValueError(
            f"no group size fits: {least.slots_per_rank} slots in groups of {least.group_size} need least, "
            f"{bytes_text(least.resident_bytes)} of a rank for experts and their state, and {bytes_text(most_bytes)} "
            "are there. Plan for more ranks, or give the memory with --gpu-gbytes."
        )
    sizes = dict.fromkeys(point.group_size for point in fitting)
    knees = tuple(knee([point for point in fitting if point.group_size == size]) for size in sizes)
    chosen = min(knees, key=lambda point: (point.seconds, -point.group_size))
    allowed = [factor for factor, dropped in sorted(chosen.dropped.items()) if dropped <= most_dropped]
    return Recommendation(chosen, allowed[0] if allowed else None, knees, most_dropped)


def knee(points: Sequence[Point]) -> Point:
    """The fewest slots above which no number of them lowers the imbalance by `LEAST_GAIN` a step or more.

    All larger numbers are looked at, since one that buys little may stand before one that buys much.

    Args:
        points: of one group size, fewest slots first.
    """
    return next(
        point
        for index, point in enumerate(points)
        if all(
            point.imbalance - later.imbalance < LEAST_GAIN * steps
            for steps, later in enumerate(points[index + 1 :], start=1)
        )
    )
