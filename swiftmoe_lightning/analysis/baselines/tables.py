"""Home ranks and slot tables, which several baselines share. E experts, W ranks, s slots of a rank."""

from __future__ import annotations

import numpy as np


def home_ranks(num_experts: int, world_size: int) -> np.ndarray:
    """The home rank of each expert: neighbours together, or, with fewer experts than ranks, one a rank at most.

    Args:
        num_experts: E.
        world_size: W.

    Returns:
        [E] int64.
    """
    return np.arange(num_experts) * world_size // num_experts


def fill_slots(experts: list[int], repeated: list[int], slots_per_rank: int) -> list[int]:
    """One rank's s slots: its experts, then `repeated` over and over, which adds no pair.

    Args:
        experts: those of the rank.
        repeated: those of them that fill the slots left over.
        slots_per_rank: s.
    """
    return (experts + repeated * slots_per_rank)[:slots_per_rank]
