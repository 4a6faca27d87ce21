"""The two weight exchanges as integers: how many elements each rank sends to each, and where they lie in the buffers.

An expert's tensors are cut by rows over all ranks (DTensor `Shard(1)` of [E, rows, ...]): rank j owns rows
`shard_rows(rows, W)[j]` of every expert. Collect sends rank j's rows of each gradient to rank j; distribute sends rank
j's rows of each expert to the ranks that have the expert. W ranks, P (rank, expert) pairs, d pairs of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """Elements of one layer's exchange: rank r sends source_W[r] * destination_W[j] of them to rank j.

    The whole table has W * W entries, of which a rank needs its row and its column.

    Attributes:
        source_W: [W] int64.
        destination_W: [W] int64.
    """

    source_W: np.ndarray
    destination_W: np.ndarray

    def send_splits(self, rank: int) -> list[int]:
        """[W] elements that `rank` sends to each rank, itself included."""
        return (self.source_W[rank] * self.destination_W).tolist()

    def receive_splits(self, rank: int) -> list[int]:
        """[W] elements that `rank` gets from each rank, itself included."""
        return (self.source_W * self.destination_W[rank]).tolist()

    def elements_sent(self, rank: int) -> int:
        """Elements that `rank` sends to other ranks."""
        return int(self.source_W[rank] * (self.destination_W.sum() - self.destination_W[rank]))


def plan_collection(placement: Placement, row_elements: Sequence[tuple[int, int]]) -> TransferPlan:
    """Gradients from the ranks that have an expert to the owners of its rows.

    Where W divides the rows, all ranks together send G * (P - P / W) elements, G being those of one expert.

    Args:
        placement: which ranks have which expert.
        row_elements: for each tensor of an expert, its rows and the elements of one row.
    """
    return TransferPlan(placement.num_pairs_W, shard_elements(tuple(row_elements), placement.world_size))


def plan_distribution(
    placement: Placement, row_elements: Sequence[tuple[int, int]], arrives_P: np.ndarray | None = None
) -> TransferPlan:
    """Weights from the owners of an expert's rows to the ranks that have it in `placement`.

    Args:
        placement: which ranks have which expert.
        row_elements: for each tensor of an expert, its rows and the elements of one row.
        arrives_P: [P] bool, the pairs whose weights are sent; None for all.
    """
    arriving_W = placement.num_pairs_W
    if arrives_P is not None:
        arriving_W = np.bincount(placement.pair_rank_P[arrives_P], minlength=placement.world_size)
    return TransferPlan(shard_elements(tuple(row_elements), placement.world_size), arriving_W)


@lru_cache(maxsize=1024)
def shard_elements(row_elements: tuple[tuple[int, int], ...], world_size: int) -> np.ndarray:
    """Elements of one expert that each rank owns, over all its tensors.

    Args:
        row_elements: for each tensor of an expert, its rows and the elements of one row.
        world_size: W.

    Returns:
        [W] int64, read-only.
    """
    owned_W = np.zeros(world_size, dtype=np.int64)
    for num_rows, elements in row_elements:
        owned_W += [(stop - start) * elements for start, stop in shard_rows(num_rows, world_size)]
    owned_W.flags.writeable = False
    return owned_W


@dataclass(frozen=True)
class PeerBlock:
    """The part of a rank's buffer for consecutive peers that own equally many rows of every tensor.

    The block is [peers, d experts of the rank, elements], and the elements are the peer's rows of each tensor, one
    tensor after the other.

    Attributes:
        peers: the consecutive ranks.
        offset: of the block's first element in the buffer.
        rows: for each tensor, the rows that the peers own, all together, in the order of the peers.
        widths: for each tensor, the elements in the rows of one peer.
    """

    peers: range
    offset: int
    rows: tuple[range, ...]
    widths: tuple[int, ...]


@lru_cache(maxsize=1024)
def plan_buffer(row_elements: tuple[tuple[int, int], ...], world_size: int, num_experts: int) -> tuple[PeerBlock, ...]:
    """Where every row of a rank's experts lies in the flat buffer that it sends in collect and gets in distribute.

    By peer, then by expert of this rank, then by tensor, then by row. Two experts on this rank, and two tensors of
    them, A of 3 rows of 2 elements and B of 2 rows of 1; peer 0 owns rows A0, A1 and B0, peer 1 rows A2 and B1:

        expert       |------- e0 -------|------- e1 -------|---- e0 ---|---- e1 ---|
        row          | A0  A0 A1  A1 B0 | A0  A0 A1  A1 B0 | A2  A2 B1 | A2  A2 B1 |
        block        |--- peers 0..0, offset 0, widths 4 1 --|- peers 1..1, offset 10, widths 2 1 -|

    Where W divides all row counts there is one block, of all ranks, and each tensor moves in one strided copy.

    Args:
        row_elements: for each tensor of an expert, its rows and the elements of one row.
        world_size: W.
        num_experts: d, the different experts on this rank.

    Returns:
        The blocks, in the order of their offsets. Peers that own no rows have a block of no elements.
    """
    shards = [shard_rows(num_rows, world_size) for num_rows, _ in row_elements]
    sizes_W = [tuple(stop - start for start, stop in shard) for shard in zip(*shards, strict=True)]
    starts = [rank for rank in range(world_size) if rank == 0 or sizes_W[rank] != sizes_W[rank - 1]]
    blocks, offset = [], 0
    for first, stop in pairwise([*starts, world_size]):
        rows = tuple(range(shard[first][0], shard[stop - 1][1]) for shard in shards)
        widths = tuple(size * width for size, (_, width) in zip(sizes_W[first], row_elements, strict=True))
        blocks.append(PeerBlock(range(first, stop), offset, rows, widths))
        offset += (stop - first) * num_experts * sum(widths)
    return tuple(blocks)
