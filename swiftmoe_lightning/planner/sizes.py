"""What a trace was recorded with, where the user does not say otherwise."""

from __future__ import annotations

from dataclasses import dataclass

from swiftmoe_lightning.planner.trace import Trace


@dataclass(frozen=True)
class Sizes:
    """Ranks, slots and capacity to plan for. capacity_factor: None is dropless."""

    num_ranks: int
    slots_per_rank: int
    capacity_factor: float | None

    @classmethod
    def of(
        cls, trace: Trace, num_ranks: int | None, slots_per_rank: int | None, capacity_factor: float | None
    ) -> Sizes:
        """What is given, else what the trace's own run had.

        Raises ValueError when neither says how many ranks or slots there are.
        """

        def known(name: str, given: int | None, key: str) -> int:
            value = trace.metadata.get(key) if given is None else given
            if value is None:
                raise ValueError(f"the trace does not say how many {name} to plan for. Add --{name}.")
            return int(value)

        if capacity_factor is None:
            capacity_factor = trace.metadata.get("capacity_factor")
        return cls(
            known("ranks", num_ranks, "world_size"), known("slots", slots_per_rank, "slots_per_rank"), capacity_factor
        )
