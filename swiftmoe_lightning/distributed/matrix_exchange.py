"""Applies a function of whole matrices to matrices that are cut by rows over ranks: all-to-all, function, all-to-all.

What `plan_matrices` says is carried out here. W ranks, n matrices of a block.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from swiftmoe_lightning.distributed.group import PendingExchange, RankGroup
from swiftmoe_lightning.placement import MatrixBlock, MatrixStack, plan_matrices, shard_rows

# Of a rank's share of what is under way at once, unless one matrix is larger.
MOST_ELEMENTS: Final = 1 << 25


@dataclass(frozen=True, eq=False)
class CutMatrices:
    """A stack of matrices of which this rank has some rows.

    Attributes:
        stack: their number and shape.
        rows_W: each rank's rows of every matrix; no two ranks have the same.
        read: of first and stop, this rank's rows of these matrices, [n, rows, columns].
        write: takes first, stop, and these rows of the function's result.
    """

    stack: MatrixStack
    rows_W: Sequence[range]
    read: Callable[[int, int], Tensor]
    write: Callable[[int, int, Tensor], None]


def rows_by_rank(value: DTensor, dim: int) -> tuple[dist.ProcessGroup, list[range]] | None:
    """The group of ranks over which `dim` is cut, and each one's indices of it, in the group's order.

    Returns:
        None where another dim is cut, too, or where the ranks along the axes that cut it have no group of theirs.
    """
    mesh, placements = value.device_mesh, value.placements
    axes = [axis for axis, placement in enumerate(placements) if not placement.is_replicate()]
    # Not a subclass of Shard, which cuts in another order.
    if not axes or any(type(placements[a]) is not Shard or placements[a].dim != dim for a in axes):  # type: ignore[attr-defined]
        return None
    if len(axes) == 1:
        group = mesh.get_group(axes[0])
    elif len(axes) == mesh.ndim and mesh.size() == dist.get_world_size():
        assert dist.group.WORLD is not None
        group = dist.group.WORLD
    else:
        return None
    coordinates = dict(zip(mesh.mesh.flatten().tolist(), product(*map(range, mesh.shape)), strict=True))
    ranges = []
    for rank in dist.get_process_group_ranks(group):
        first, last = 0, value.shape[dim]
        for axis in axes:
            start, stop = shard_rows(last - first, mesh.size(axis))[coordinates[rank][axis]]
            first, last = first + start, first + stop
        ranges.append(range(first, last))
    return group, ranges


def apply_to_whole(
    matrices: Sequence[CutMatrices], function: Callable[[int, Tensor], Tensor], ranks: RankGroup | None
) -> int:
    """Write the function's result of every matrix. A collective of `ranks`.

    While a bucket's matrices are worked on, the next one's rows are under way.

    Args:
        matrices: in the same order on all ranks.
        function: of the index of a stack and some of its matrices, [n, rows, columns], whole; the same shape and dtype
            comes back.
        ranks: over which they are cut; None where this rank has all rows.

    Returns:
        Bytes that this rank has sent to other ranks.
    """
    num_ranks = 1 if ranks is None else ranks.size
    plan = plan_matrices(tuple(cut.stack for cut in matrices), num_ranks, MOST_ELEMENTS)
    if ranks is None or num_ranks == 1:
        for block in (block for bucket in plan for block in bucket):
            cut = matrices[block.stack]
            cut.write(block.first, block.stop, function(block.stack, cut.read(block.first, block.stop)))
        return 0
    buckets = [_Bucket(matrices, blocks, ranks) for blocks in plan]
    for number, bucket in enumerate(buckets):
        if number == 0:
            bucket.start()
        bucket.put_together()
        if number + 1 < len(buckets):
            buckets[number + 1].start()
        bucket.apply(function)
        if number:
            buckets[number - 1].write()
    if buckets:
        buckets[-1].write()
    return sum(bucket.bytes_sent for bucket in buckets)


def refuse_different_matrices(matrices: Sequence[object], ranks: RankGroup, device: torch.device) -> None:
    """A collective.

    Args:
        matrices: what this rank will work on, equal on all ranks by its `repr`.
        ranks: that meet.
        device: from which numbers travel.

    Raises:
        RuntimeError: on all ranks, unless it is the same on all.
    """
    checksum = zlib.crc32(repr(matrices).encode())
    checksums = ranks.all_gather(torch.tensor([checksum, len(matrices)], device=device)).tolist()
    if any(other != checksums[0] for other in checksums):
        raise RuntimeError(
            "ranks are about to orthogonalise different matrices together: they have gradients of "
            f"{[count for _, count in checksums]} stacks of them, by rank. Let every rank's optimizer have the same "
            "parameter groups, and reset or remove the same gradients on all ranks. (FAQ: muon-on-experts)"
        )


class _Bucket:
    """Blocks of matrices on their way to the ranks that put them together, and their results on the way back."""

    def __init__(self, matrices: Sequence[CutMatrices], blocks: Sequence[MatrixBlock], ranks: RankGroup) -> None:
        self._ranks, self.bytes_sent = ranks, 0
        self._all = [(matrices[block.stack], block) for block in blocks]
        self._own = [(cut, block) for cut, block in self._all if block.rank == ranks.rank]
        # Elements of this rank's rows for each rank, and of each rank's rows for this one.
        self._from_here, self._to_here = [0] * ranks.size, [0] * ranks.size
        for cut, block in self._all:
            self._from_here[block.rank] += block.num_matrices * cut.stack.columns * len(cut.rows_W[ranks.rank])
        for cut, block in self._own:
            for rank, rows in enumerate(cut.rows_W):
                self._to_here[rank] += block.num_matrices * cut.stack.columns * len(rows)
        self._pending: PendingExchange | None = None
        self._wholes: list[Tensor] = []

    def start(self) -> None:
        """Send this rank's rows to the ranks that put them together."""
        rows = [cut.read(block.first, block.stop).flatten() for cut, block in self._all]
        self._send(torch.cat(rows), self._from_here, self._to_here)

    def put_together(self) -> None:
        """Wait for the other ranks' rows."""
        received = self._received()
        self._wholes = [
            received.new_empty(block.num_matrices, cut.stack.rows, cut.stack.columns) for cut, block in self._own
        ]
        pieces = received.split([rows.numel() for rows in self._rows_by_rank()])
        for rows, piece in zip(self._rows_by_rank(), pieces, strict=True):
            rows.copy_(piece.view(rows.shape))

    def apply(self, function: Callable[[int, Tensor], Tensor]) -> None:
        """Replace whole matrices by the function's result, and send it back."""
        like = self._all[0][0].read(0, 0)
        for index, (_, block) in enumerate(self._own):
            self._wholes[index] = function(block.stack, self._wholes[index])
        rows = [like.flatten(), *(rows.flatten() for rows in self._rows_by_rank())]
        self._wholes = []
        self._send(torch.cat(rows), self._to_here, self._from_here)

    def write(self) -> None:
        """Wait for this rank's rows of the results, and write them."""
        received, offset = self._received(), 0
        for cut, block in self._all:
            shape = (block.num_matrices, len(cut.rows_W[self._ranks.rank]), cut.stack.columns)
            stop = offset + math.prod(shape)
            cut.write(block.first, block.stop, received[offset:stop].view(shape))
            offset = stop

    def _rows_by_rank(self) -> list[Tensor]:
        """Each rank's rows of this rank's matrices: by rank, then by block, as they travel."""
        return [
            whole[:, rows.start : rows.stop]
            for rank in range(self._ranks.size)
            for rows, whole in zip((cut.rows_W[rank] for cut, _ in self._own), self._wholes, strict=True)
        ]

    def _send(self, rows: Tensor, send_splits: list[int], receive_splits: list[int]) -> None:
        self._pending = self._ranks.start_all_to_all(rows, send_splits, receive_splits)
        self.bytes_sent += self._pending.bytes_sent

    def _received(self) -> Tensor:
        assert self._pending is not None
        received, self._pending = self._pending.wait(), None
        return received
