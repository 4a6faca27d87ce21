"""The two weight exchanges as messages, one for the rows of one tensor of one expert that one rank owns.

E experts, P (rank, expert) pairs ordered by (rank, expert), W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swiftmoe_lightning.placement.moves import arriving_indices
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.transfer import shard_rows


@dataclass(frozen=True)
class SlotBlock:
    """A peer's rows of one tensor of an expert in this rank's slots.

    Attributes:
        peer: the rank that owns the rows.
        index: of the expert among those of this rank.
        tensor: which of the expert's.
        rows: of the whole tensor.
    """

    peer: int
    index: int
    tensor: int
    rows: slice


@dataclass(frozen=True)
class ShardBlock:
    """This rank's rows of one tensor of an expert that is in a peer's slots.

    Attributes:
        peer: the rank that has the expert.
        pair: index of (peer, expert) among all pairs.
        expert: of 0..E-1.
        tensor: which of the expert's.
    """

    peer: int
    pair: int
    expert: int
    tensor: int


@dataclass(frozen=True)
class Messages:
    """One rank's messages. Distribute receives the first and sends the second; collect the other way round.

    Two ranks list the blocks between them in the same order.

    Attributes:
        in_slots: blocks of this rank's experts that others own.
        in_shards: blocks of other ranks' experts that this one owns.
    """

    in_slots: list[SlotBlock]
    in_shards: list[ShardBlock]


def plan_messages(
    placement: Placement, num_rows: Sequence[int], rank: int, arrives_P: np.ndarray | None = None
) -> Messages:
    """The messages of one rank.

    Peers come in the order of their distance from the rank, so that not all ranks begin with the same one. Blocks
    without rows are left out.

    Args:
        placement: which ranks have which expert.
        num_rows: for each tensor of an expert, its rows.
        rank: of 0..W-1.
        arrives_P: [P] bool, the pairs whose rows are sent; None for all.
    """
    indices = arriving_indices(placement, rank, arrives_P).tolist()
    world_size = placement.world_size
    shards = [shard_rows(rows, world_size) for rows in num_rows]
    owned = [[t for t, shard in enumerate(shards) if shard[peer][0] < shard[peer][1]] for peer in range(world_size)]
    in_slots: list[SlotBlock] = []
    in_shards: list[ShardBlock] = []
    for distance in range(1, world_size):
        before, behind = (rank - distance) % world_size, (rank + distance) % world_size
        for index in indices:
            in_slots += [SlotBlock(before, index, t, slice(*shards[t][before])) for t in owned[before]]
        for pair in (placement.first_pair_W[behind] + arriving_indices(placement, behind, arrives_P)).tolist():
            expert = int(placement.pair_expert_P[pair])
            in_shards += [ShardBlock(behind, pair, expert, t) for t in owned[rank]]
    return Messages(in_slots, in_shards)
