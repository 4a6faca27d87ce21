"""Integer tables of the two weight phases: who sends how many elements to whom.

An expert's tensors are cut by rows over all ranks (DTensor `Shard(1)` of [E, rows, ...]): rank j owns rows
`shard_rows(rows, W)[j]` of every expert. Collect sends rank j's rows of each hosted gradient to rank j; distribute
sends rank j's rows of each expert to the hosts of that expert. W ranks, P hosted (rank, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from swiftmoe_lightning.placement.placement import Placement


def shard_rows(num_rows: int, world_size: int) -> list[tuple[int, int]]:
    """Cut rows over the ranks as `torch.chunk` cuts: equal parts, the last ones shorter.

    Args:
        num_rows: rows of one tensor of one expert.
        world_size: W.

    Returns:
        First and last-plus-one row of each rank's shard.
    """
    size = -(-num_rows // world_size)
    return [(min(j * size, num_rows), min((j + 1) * size, num_rows)) for j in range(world_size)]


def peer_runs(rows_of_tensors: Sequence[int], world_size: int) -> list[range]:
    """The ranks, cut into runs of neighbours that own equally many rows of every tensor.

    One run where W divides all row counts: such neighbours' pieces move in one strided copy.

    Args:
        rows_of_tensors: rows of each tensor of an expert.
        world_size: W.
    """
    shards = [shard_rows(num_rows, world_size) for num_rows in rows_of_tensors]
    sizes_W = [tuple(stop - start for start, stop in peer) for peer in zip(*shards, strict=True)]
    starts = [rank for rank in range(world_size) if rank == 0 or sizes_W[rank] != sizes_W[rank - 1]]
    return [range(start, stop) for start, stop in pairwise([*starts, world_size])]


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Elements per rank pair of one layer's exchange.

    Attributes:
        elements_WW: [W, W] int64, [source, destination]; the diagonal stays on its rank.
    """

    elements_WW: np.ndarray

    def send_splits(self, rank: int) -> list[int]:
        """[W] elements that `rank` sends to each rank."""
        return self.elements_WW[rank].tolist()

    def receive_splits(self, rank: int) -> list[int]:
        """[W] elements that `rank` gets from each rank."""
        return self.elements_WW[:, rank].tolist()

    def elements_sent(self, rank: int) -> int:
        """Elements that `rank` puts on the wire (what it keeps for itself does not count)."""
        return int(self.elements_WW[rank].sum() - self.elements_WW[rank, rank])


def plan_collection(placement: Placement, row_elements: Sequence[tuple[int, int]]) -> TransferPlan:
    """Gradients from hosts to the owners of their rows.

    When W divides the rows, all ranks together send G * (P - P / W), G elements in one expert.

    Args:
        placement: the hosts.
        row_elements: for each tensor of an expert, its rows and the elements of one row.
    """
    return TransferPlan(np.outer(placement.num_hosted_W, shard_elements(row_elements, placement.world_size)))


def plan_distribution(placement: Placement, row_elements: Sequence[tuple[int, int]]) -> TransferPlan:
    """Weights from the owners of their rows to the hosts of `placement`: the collection, turned round.

    Args:
        placement: the hosts.
        row_elements: for each tensor of an expert, its rows and the elements of one row.
    """
    return TransferPlan(plan_collection(placement, row_elements).elements_WW.T)


def shard_elements(row_elements: Sequence[tuple[int, int]], world_size: int) -> np.ndarray:
    """Elements of one expert that each rank owns, over all its tensors.

    Args:
        row_elements: for each tensor of an expert, its rows and the elements of one row.
        world_size: W.

    Returns:
        [W] int64.
    """
    owned_W = np.zeros(world_size, dtype=np.int64)
    for num_rows, elements in row_elements:
        owned_W += [(stop - start) * elements for start, stop in shard_rows(num_rows, world_size)]
    return owned_W
