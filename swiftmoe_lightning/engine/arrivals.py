"""Phase 4 of a step: which experts arrive where they were not, and where those that stay go.

R expert groups, E experts, s slots of a rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup, to_device, to_host
from swiftmoe_lightning.placement import Placement

if TYPE_CHECKING:
    from swiftmoe_lightning.engine.sharded_layer import ShardedLayer


def queue_distributions(
    placed: Sequence[tuple[ShardedLayer, Placement]], group: ExpertGroup | None
) -> list[ShardedLayer]:
    """Let weights be sent to the ranks of new placements. A collective of several groups.

    Args:
        placed: layers, the same in all groups, and their next placements, each group's own.
        group: None on one rank.

    Returns:
        The layers with weights to be sent, the same in all groups.
    """
    arrivals = find_arrivals(placed, group)
    queued = zip(placed, arrivals, strict=True)
    return [layer for (layer, placement), arrives_E in queued if layer.queue_distribution(placement, arrives_E)]


def find_arrivals(placed: Sequence[tuple[ShardedLayer, Placement]], group: ExpertGroup | None) -> list[np.ndarray]:
    """The experts that a rank of any group gets by these placements and does not have. A collective of several groups.

    Rows of weights that have not changed are cut over all groups, too: a group in which experts arrive needs the rows
    that others own, and they do not know its placements. Where all weights change there is nothing to agree on.

    Args:
        placed: layers and their next placements.
        group: None on one rank.

    Returns:
        For each layer, [E] bool; none where all its weights change, and so are sent whole.
    """
    keep = [layer.keeps_some() for layer, _ in placed]
    own = [
        layer.slots.arrivals(placement) if keeps else np.zeros(placement.num_experts, dtype=bool)
        for (layer, placement), keeps in zip(placed, keep, strict=True)
    ]
    if group is None or group.replicate is None or not any(keep):
        return own
    (row,) = to_device(placed[0][0].slots.device, np.concatenate(own).astype(np.int32))
    arrives_RE = to_host(group.replicate.all_gather(row))
    return np.split(arrives_RE.any(0), np.cumsum([len(arrives_E) for arrives_E in own])[:-1])


def move_in_slots(slots: Iterable[Tensor], moves: Sequence[tuple[int, int]]) -> None:
    """Copy the experts that stay on a rank to their new indices.

    Args:
        slots: [s, ...] each.
        moves: of `plan_moves`.
    """
    for slot in slots:
        for old, new in moves:
            slot[new].copy_(slot[old])
