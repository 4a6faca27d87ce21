"""The ranks that share the experts, and the few collectives they use.

W ranks, R rows sent, D features of a row.
"""

from __future__ import annotations

import atexit
import functools
import gc
import os
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXIS: Final = "expert"


class ExpertGroup:
    """All ranks of the default process group, as one mesh axis named "expert".

    Args:
        device_type: of the mesh, and of the parameters that are cut over it.
        ranks_per_node: neighbouring ranks that share a node; None takes torchrun's LOCAL_WORLD_SIZE, or one
            node without it.

    Raises:
        RuntimeError: when no process group is initialized.
    """

    def __init__(self, device_type: str, ranks_per_node: int | None = None) -> None:
        if not dist.is_initialized():
            raise RuntimeError("ExpertGroup needs torch.distributed: call torch.distributed.init_process_group first.")
        self.mesh: DeviceMesh = init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=(AXIS,))
        self.process_group = self.mesh.get_group()
        self._weights_group = _second_group_of(self.process_group, device_type)
        self.rank: int = self.mesh.get_local_rank()
        self.world_size: int = self.mesh.size()
        launched = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        self.ranks_per_node = launched if ranks_per_node is None else ranks_per_node
        _clean_up_at_exit()

    def all_gather(self, row: Tensor) -> Tensor:
        """Gather every rank's `row`.

        Args:
            row: [n], equally long on all ranks.

        Returns:
            [W, n], on the device of `row`.
        """
        rows = row.new_empty(self.world_size * len(row))
        # torch 2.13 renames the call and warns at the old name.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(rows, row, group=self.process_group)
        return rows.view(self.world_size, -1)

    def all_reduce(self, value: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `value` over the ranks, in place, by a `torch.distributed.ReduceOp`. Returns it."""
        dist.all_reduce(value, op=op, group=self.process_group)
        return value

    def broadcast_int(self, value: int, device: torch.device) -> int:
        """Rank 0's whole number `value`, on every rank. It travels from `device` to `device`."""
        broadcast_value = torch.tensor(value, device=device)
        dist.broadcast(broadcast_value, group=self.process_group, group_src=0)
        return int(broadcast_value.item())

    def start_weight_exchange(self, send: Tensor, send_splits: list[int], receive_splits: list[int]) -> PendingExchange:
        """`start_all_to_all` in a second process group.

        So counts and tokens do not queue behind weights; and where some ranks exchange weights and others do not, the
        next gather of counts still runs, and its check reports them.

        Args:
            send: [R, ...]; nothing may touch it before `wait()`.
            send_splits: for each rank, how much of dim 0 goes there.
            receive_splits: for each rank, how much comes from there.
        """
        return self._start(send, send_splits, receive_splits, self._weights_group)

    def start_all_to_all(self, send: Tensor, send_splits: list[int], receive_splits: list[int]) -> PendingExchange:
        """Begin an all-to-all, in which the i-th split of `send` (along dim 0) goes to rank i.

        Args:
            send: [R, ...]; nothing may touch it before `wait()`.
            send_splits: for each rank, how much of dim 0 goes there.
            receive_splits: for each rank, how much comes from there.
        """
        return self._start(send, send_splits, receive_splits, self.process_group)

    def _start(
        self, send: Tensor, send_splits: list[int], receive_splits: list[int], group: dist.ProcessGroup
    ) -> PendingExchange:
        received = send.new_empty((sum(receive_splits), *send.shape[1:]))
        work = dist.all_to_all_single(received, send, receive_splits, send_splits, group=group, async_op=True)
        row_bytes = send.element_size() * (send[0].numel() if send.dim() > 1 and len(send) else 1)
        num_sent = sum(send_splits) - send_splits[self.rank]
        return PendingExchange(work, send, received, num_sent * row_bytes)

    def exchange_rows(self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Send rows to their ranks by all-to-all. Backward sends their gradients back.

        Args:
            rows_RD: [R, D], in the order of the ranks they go to.
            send_splits: for each rank, how many rows go there.
            receive_splits: for each rank, how many come from there.

        Returns:
            [rows received, D], in the order of the ranks they come from.
        """
        return _ExchangeRows.apply(rows_RD, self, send_splits, receive_splits)


class PendingExchange:
    """An all-to-all under way.

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
        ctx: Any, rows: Tensor, group: ExpertGroup, send_splits: list[int], receive_splits: list[int]
    ) -> Tensor:
        ctx.group, ctx.splits = group, (send_splits, receive_splits)
        return group.start_all_to_all(rows.contiguous(), send_splits, receive_splits).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send_splits, receive_splits = ctx.splits
        grad_rows = ctx.group.start_all_to_all(grad.contiguous(), receive_splits, send_splits).wait()
        return grad_rows, None, None, None


_second_groups: WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = WeakKeyDictionary()


def _second_group_of(group: dist.ProcessGroup, device_type: str) -> dist.ProcessGroup:
    """A second group of the same ranks, which all engines share. A collective at the first call."""
    if group not in _second_groups:
        options = getattr(group._get_backend(torch.device(device_type)), "options", None)
        timeout = getattr(options, "_timeout", None)
        _second_groups[group] = dist.new_group(dist.get_process_group_ranks(group), timeout=timeout)
    return _second_groups[group]


@functools.cache
def _clean_up_at_exit() -> None:
    """At exit, destroy the process group and free meshes.

    With gloo, a mesh that is freed as late as the interpreter's shutdown makes a worker thread abort the process
    (pytorch#190489).
    """

    def close() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()

    atexit.register(close)
