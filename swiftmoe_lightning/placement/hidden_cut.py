"""How the hidden dim of every expert is cut over the ranks, and who sends whom which piece when slots are cut so.

W ranks, E experts, F hidden dim. Rank w's piece of an expert is the w-th part of the hidden dim in each of its tensors.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from swiftmoe_lightning.placement.placement import Placement

# How a dim counts hidden units: each once, all gates before all ups, or each gate beside its up.
HiddenLayout = Literal["single", "halves", "pairs"]


def hidden_slices(length: int, layout: HiddenLayout, world_size: int, rank: int) -> tuple[slice, ...]:
    """Which indices of a dim are a rank's piece: as even as whole hidden units allow.

    Args:
        length: of the dim; F, or 2F where it has gates and ups.
        layout: how it counts hidden units.
        world_size: W.
        rank: whose piece.

    Returns:
        Slices, in their order in the piece.
    """
    num_units = length if layout == "single" else length // 2
    first, stop = rank * num_units // world_size, (rank + 1) * num_units // world_size
    if layout == "halves":
        return slice(first, stop), slice(num_units + first, num_units + stop)
    return (slice(first, stop),) if layout == "single" else (slice(2 * first, 2 * stop),)


def piece_senders(placement: Placement) -> np.ndarray:
    """[W, E] int64: which rank each rank gets its piece of each expert from.

    From itself where it has the expert; else from one of those that have it, in turn.

    Args:
        placement: of the slots that are cut.
    """
    rank_W = np.arange(placement.world_size)
    sender_WE = np.empty((placement.world_size, placement.num_experts), np.int64)
    for expert in range(placement.num_experts):
        hosts = placement.pair_rank_P[placement.pair_expert_P == expert]
        sender_WE[:, expert] = hosts[(rank_W + expert) % len(hosts)]
        sender_WE[hosts, expert] = hosts
    return sender_WE
