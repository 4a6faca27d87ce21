"""A process group as one rank sees it, and the few collectives that the package uses.

n ranks of the group, R rows sent, D features of a row.
"""

from __future__ import annotations

import atexit
import functools
import gc
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from swiftmoe_lightning.distributed.wire import pack_rows, returned_dtype, unpack_rows
from swiftmoe_lightning.ops import reused_empty
from swiftmoe_lightning.placement import shard_rows


class RankGroup:
    """A process group, with the collectives of its ranks.

    Args:
        process_group: this rank is in it.

    Attributes:
        rank: this rank's number in the group.
        size: n.
        ranks: their numbers in the world.
        bytes_to_others_n: [n] int64, what this rank has sent to each other one, by all-to-all or messages.
    """

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group
        self.rank: int = process_group.rank()
        self.size: int = process_group.size()
        self.ranks: list[int] = dist.get_process_group_ranks(process_group)
        self.bytes_to_others_n = np.zeros(self.size, dtype=np.int64)
        _clean_up_at_exit()

    def own_rows(self, num_rows: int) -> slice:
        """Which of `num_rows` rows that are cut over the group are this rank's."""
        return slice(*shard_rows(num_rows, self.size)[self.rank])

    def second(self, device_type: str) -> RankGroup:
        """A second group of the same ranks, in which nothing queues behind this one. A collective at the first call.

        All engines share it.

        Args:
            device_type: on which it will be used.
        """
        return self.part(range(self.size), device_type)

    def part(self, members: range, device_type: str) -> RankGroup:
        """Another group of some of the ranks, this one among them. A collective of theirs at the first call.

        All engines share it.

        Args:
            members: their numbers in this group.
            device_type: on which it will be used.
        """
        parts = _parts.setdefault(self.process_group, {})
        if members not in parts:
            timeout = timeout_of(self.process_group, device_type)
            ranks = [self.ranks[member] for member in members]
            # Only these ranks meet here, for other groups are made by others at the same time.
            is_part = len(ranks) < dist.get_world_size()
            parts[members] = dist.new_group(ranks, timeout=timeout, use_local_synchronization=is_part)
        return RankGroup(parts[members])

    def all_gather(self, row: Tensor) -> Tensor:
        """Gather every rank's `row`.

        Args:
            row: [m], equally long on all ranks.

        Returns:
            [n, m], on the device of `row`.
        """
        return self.start_all_gather(row).wait()

    def start_all_gather(self, row: Tensor) -> PendingExchange:
        """Begin `all_gather`."""
        rows = row.new_empty(self.size * len(row))
        # torch 2.13 renames the call and warns at the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(rows, row, group=self.process_group, async_op=True)
        return PendingExchange(work, row, rows.view(self.size, -1), (self.size - 1) * row.nbytes)

    def all_reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `value` over the ranks, in place, by a `torch.distributed.ReduceOp`. Returns it."""
        dist.all_reduce(value, op=op, group=self.process_group)
        return value

    def broadcast(self, value: Tensor) -> Tensor:
        """Write the first rank's `value` to all ranks' `value`. Returns it."""
        dist.broadcast(value, group=self.process_group, group_src=0)
        return value

    def start_all_to_all(self, send: Tensor, send_splits: list[int], receive_splits: list[int]) -> PendingExchange:
        """Begin an all-to-all, in which the i-th split of `send` (along dim 0) goes to rank i.

        Args:
            send: [R, ...]; nothing may touch it before `wait()`.
            send_splits: for each rank, how much of dim 0 goes there.
            receive_splits: for each rank, how much comes from there.
        """
        received = reused_empty((sum(receive_splits), *send.shape[1:]), send.dtype, send.device)
        work = dist.all_to_all_single(
            received, send, receive_splits, send_splits, group=self.process_group, async_op=True
        )
        row_bytes = send.element_size() * (send[0].numel() if send.dim() > 1 and len(send) else 1)
        bytes_to_others_n = row_bytes * np.array(send_splits)
        bytes_to_others_n[self.rank] = 0
        self.bytes_to_others_n += bytes_to_others_n
        return PendingExchange(work, send, received, int(bytes_to_others_n.sum()))

    def start_send(self, value: Tensor, rank: int) -> Any:
        """Begin to send a contiguous `value` to a rank of the group; it must stay as it is until `wait()`."""
        self.bytes_to_others_n[rank] += value.nbytes
        return dist.isend(value, group=self.process_group, group_dst=rank)

    def start_receive(self, value: Tensor, rank: int) -> Any:
        """Begin to receive a contiguous `value` from a rank of the group; it is there after the work's `wait()`."""
        return dist.irecv(value, group=self.process_group, group_src=rank)

    def exchange_rows(
        self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int], dtype: torch.dtype | None = None
    ) -> Tensor:
        """Send rows to their ranks by all-to-all. Backward sends their gradients back.

        Args:
            rows_RD: [R, D], in the order of the ranks they go to.
            send_splits: for each rank, how many rows go there.
            receive_splits: for each rank, how many come from there.
            dtype: in which they travel, as in `pack_rows`; gradients in `returned_dtype` of it.

        Returns:
            [rows received, D], in the order of the ranks they come from, in the dtype of `rows_RD`.
        """
        return _ExchangeRows.apply(rows_RD, self, send_splits, receive_splits, dtype)


def timeout_of(process_group: dist.ProcessGroup, device_type: str) -> timedelta | None:
    """How long the group waits in a collective on this type of device; None where its backend does not say."""
    options = getattr(process_group._get_backend(torch.device(device_type)), "options", None)
    timeout: timedelta | None = getattr(options, "_timeout", None)
    return timeout


class PendingExchange:
    """A collective under way.

    Attributes:
        bytes_sent: to other ranks.
    """

    def __init__(self, work: Any, send: Tensor, received: Tensor, bytes_sent: int) -> None:
        self._work, self._send, self._received = work, send, received
        self.bytes_sent = bytes_sent

    def wait(self) -> Tensor:
        """The received tensor, ready for use on the current stream."""
        self._work.wait()
        return self._received


class _ExchangeRows(torch.autograd.Function):
    """Forward: all-to-all of rows. Backward: all-to-all of their gradients with send and receive splits swapped."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        group: RankGroup,
        send_splits: list[int],
        receive_splits: list[int],
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.group, ctx.splits, ctx.dtype = group, (send_splits, receive_splits), returned_dtype(dtype)
        return _exchange(group, rows, send_splits, receive_splits, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        send_splits, receive_splits = ctx.splits
        return _exchange(ctx.group, grad, receive_splits, send_splits, ctx.dtype), None, None, None, None


def _exchange(
    group: RankGroup, rows: Tensor, send_splits: list[int], receive_splits: list[int], dtype: torch.dtype | None
) -> Tensor:
    received = group.start_all_to_all(pack_rows(rows, dtype), send_splits, receive_splits).wait()
    return unpack_rows(received, dtype, rows.dtype)


# Group -> ranks of it -> another group of these, which all engines share.
_parts: WeakKeyDictionary[dist.ProcessGroup, dict[range, dist.ProcessGroup]] = WeakKeyDictionary()
# World group -> (device type, g) -> mesh, which all engines share.
meshes: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, int], DeviceMesh]] = WeakKeyDictionary()


@functools.cache
def _clean_up_at_exit() -> None:
    """At exit, destroy the process group and free meshes.

    With gloo, a mesh that is freed as late as the interpreter's shutdown makes a worker thread abort the process
    (pytorch#190489).
    """

    def close() -> None:
        _parts.clear()
        meshes.clear()
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()

    atexit.register(close)
