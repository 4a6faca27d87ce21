"""The exchange between expert groups: sums of gradients to the owners of their rows, and updated rows to all.

The rows of every expert's tensor are cut over the g ranks of a group; each part is cut again over the R ranks that have
it, one of each group. E experts, p rows of a tensor in the part, r of them that this rank owns.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import PendingExchange, RankGroup, to_device
from swiftmoe_lightning.ops import reused_empty
from swiftmoe_lightning.placement import shard_rows


class ReplicaExchange:
    """Two exchanges of one layer between R expert groups, R > 1.

    Args:
        ranks: the R ranks that share a part.
        shapes: name -> [E, p, ...], of the part.
        arrives_E: [E] bool, the experts that are exchanged, the same for all ranks; None for all.
    """

    def __init__(self, ranks: RankGroup, shapes: Mapping[str, torch.Size], arrives_E: np.ndarray | None = None) -> None:
        self._ranks, self._shapes, self._arrives_E = ranks, shapes, arrives_E
        self._num_experts = next(iter(shapes.values()))[0] if arrives_E is None else int(arrives_E.sum())
        # For each of the R ranks its rows of each tensor, and its elements of one expert, over all of them.
        self._rows_R = [
            [slice(*rows) for rows in rows_of_rank]
            for rows_of_rank in zip(*(shard_rows(shape[1], ranks.size) for shape in shapes.values()), strict=True)
        ]
        self._widths_R = [
            [(rows.stop - rows.start) * shape[2:].numel() for rows, shape in zip(of_rank, shapes.values(), strict=True)]
            for of_rank in self._rows_R
        ]

    def start_sum(self, part: Mapping[str, Tensor], wire_dtype: torch.dtype) -> PendingExchange:
        """Begin to send each owner its rows of this group's sum.

        Args:
            part: name -> [E, p, ...].
            wire_dtype: in which they travel.
        """
        sizes_R = [self._num_experts * sum(widths) for widths in self._widths_R]
        send = reused_empty((sum(sizes_R),), wire_dtype, next(iter(part.values())).device)
        for block, rows_of_rank, widths in zip(send.split(sizes_R), self._rows_R, self._widths_R, strict=True):
            for columns, tensor, rows in zip(self._columns(block, widths), part.values(), rows_of_rank, strict=True):
                columns.copy_(tensor[:, rows].flatten(1))
        return self._ranks.start_all_to_all(send, sizes_R, [sizes_R[self._ranks.rank]] * self._ranks.size)

    def finish_sum(self, received: Tensor) -> dict[str, Tensor]:
        """Name -> [E, r, ...], the sum of all groups' sums, in the order of the groups, in float32 or wider."""
        widths = self._widths_R[self._ranks.rank]
        size = self._num_experts * sum(widths)
        blocks = [self._columns(received[i * size : (i + 1) * size], widths) for i in range(self._ranks.size)]
        wide = torch.promote_types(received.dtype, torch.float32)
        totals = {}
        for name, first, *others in zip(self._shapes, *blocks, strict=True):
            total_Ec = reused_empty(first.shape, wide, first.device).copy_(first)
            for sum_of_group_Ec in others:
                total_Ec += sum_of_group_Ec
            totals[name] = total_Ec
        rows = self._rows_R[self._ranks.rank]
        return {
            name: total_Ec.view(self._num_experts, own.stop - own.start, *self._shapes[name][2:])
            for (name, total_Ec), own in zip(totals.items(), rows, strict=True)
        }

    def start_gather(self, own: Mapping[str, Tensor]) -> PendingExchange:
        """Begin to send the rows that this rank owns, name -> [E, r, ...], to the other ranks that have the part."""
        first = next(iter(own.values()))
        # All ranks send equally much, as an all-gather needs.
        send = reused_empty((self._num_experts * max(map(sum, self._widths_R)),), first.dtype, first.device)
        columns = self._columns(send, self._widths_R[self._ranks.rank])
        experts = self._experts(send.device)
        for column, tensor in zip(columns, own.values(), strict=True):
            column.copy_(tensor[experts].flatten(1))
        return self._ranks.start_all_gather(send)

    def finish_gather(self, received: Tensor) -> dict[str, Tensor]:
        """Name -> [E, p, ...]: the whole part, of the experts that were sent."""
        experts = self._experts(received.device)
        part = {name: reused_empty(shape, received.dtype, received.device) for name, shape in self._shapes.items()}
        for block, rows_of_rank, widths in zip(received, self._rows_R, self._widths_R, strict=True):
            for columns, tensor, rows in zip(self._columns(block, widths), part.values(), rows_of_rank, strict=True):
                tensor[experts, rows] = columns.view(self._num_experts, *tensor[0, rows].shape)
        return part

    def _experts(self, device: torch.device) -> slice | Tensor:
        if self._arrives_E is None:
            return slice(None)
        (experts,) = to_device(device, np.flatnonzero(self._arrives_E))
        return experts

    def _columns(self, block: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
        """[E, columns] of each tensor in a rank's block, which may be padded."""
        num_elements = self._num_experts * sum(widths)
        return block[:num_elements].view(self._num_experts, sum(widths)).split(widths, dim=1)
