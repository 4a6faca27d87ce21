"""Ranks, slots and capacity to plan for: the user's, or else those that the trace was recorded with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from swiftmoe_lightning.analysis.trace import Trace
from swiftmoe_lightning.config import check_whole

# Limit of ranks, and of slots of a rank.
_MOST: Final = 2**16


@dataclass(frozen=True)
class Sizes:
    """Ranks, slots and capacity to plan for.

    Attributes:
        num_ranks: W.
        slots_per_rank: s.
        capacity_factor: None is dropless.
    """

    num_ranks: int
    slots_per_rank: int
    capacity_factor: float | None

    @classmethod
    def of(
        cls, trace: Trace, num_ranks: int | None, slots_per_rank: int | None, capacity_factor: float | None
    ) -> Sizes:
        """The sizes that are given, and of the trace's own run where they are not.

        Args:
            trace: its metadata says what its run had.
            num_ranks: W; None takes the run's.
            slots_per_rank: s; None takes the run's.
            capacity_factor: None takes the run's; 0 is dropless, too.

        Raises:
            ValueError: for numbers too large for any machine, when neither says how many ranks or slots there are, or
                the trace's metadata is damaged.
        """

        def resolve(name: str, option: int | None, key: str) -> int:
            value = trace.metadata.get(key) if option is None else option
            if value is None:
                raise ValueError(f"the trace does not say how many {name} to plan for. Add --{name}.")
            source = name if option is not None else f"{key} of the trace's metadata"
            check_whole(**{source: value})
            if value > _MOST:
                raise ValueError(f"{source} must be at most {_MOST}, got {value}. Give the run's own with --{name}.")
            return int(value)

        factor = trace.metadata.get("capacity_factor") if capacity_factor is None else capacity_factor
        if isinstance(factor, bool) or not isinstance(factor, int | float | None):
            raise ValueError(f"capacity_factor of the trace's metadata must be a number, got {factor!r}. Record again.")
        return cls(
            resolve("ranks", num_ranks, "world_size"),
            resolve("slots", slots_per_rank, "slots_per_rank"),
            factor or None,
        )
