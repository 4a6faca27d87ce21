"""What the baselines share: homes, ranks' slots. E experts, W ranks, s slots of a rank."""

from __future__ import annotations

import numpy as np


def home_ranks(num_experts: int, world_size: int) -> np.ndarray:
    """[E] int64: one rank for each expert, neighbours together; with fewer experts than ranks, all on their own."""
    return np.arange(num_experts) * world_size // num_experts


def fill_slots(experts: list[int], repeated: list[int], slots_per_rank: int) -> list[int]:
    """One rank's s slots: its experts, then those of them in `repeated` over and over, which adds no host."""
    return (experts + repeated * slots_per_rank)[:slots_per_rank]
