"""What the baselines share: homes, ranks' slots. E experts, W ranks, s slots of a rank."""

from __future__ import annotations

import numpy as np


def home_ranks(num_experts: int, world_size: int) -> np.ndarray:
    """One rank for each expert, neighbours together; with fewer experts than ranks, all on their own.

    Args:
        num_experts: E.
        world_size: W.

    Returns:
        [E] int64.
    """
    return np.arange(num_experts) * world_size // num_experts


def fill_slots(experts: list[int], repeated: list[int], slots_per_rank: int) -> list[int]:
    """One rank's s slots: its experts, then those of them in `repeated` over and over, which adds no pair.

    Args:
        experts: the rank's.
        repeated: those of them that fill what is left.
        slots_per_rank: s.
    """
    return (experts + repeated * slots_per_rank)[:slots_per_rank]
