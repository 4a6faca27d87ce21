"""The exchange between expert groups: sums of gradients to the owners of their rows, and updated rows to all.

R ranks, one of each group, that share a part of the rows; E experts; c elements of one expert in the part, over all
its tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup, PendingExchange
from swiftmoe_lightning.placement import num_elements, replica_slices


class ReplicaExchange:
    """Two exchanges of one layer between R expert groups, R > 1.

    Args:
        group: this rank's.
        row_elements: for each tensor of an expert, its rows and the elements of one row.
    """

    def __init__(self, group: ExpertGroup, row_elements: tuple[tuple[int, int], ...]) -> None:
        assert group.replicate is not None
        self._ranks = group.replicate
        self._slices_R = replica_slices(row_elements, group.expert.size, group.expert.rank, self._ranks.size)
        self._num_elements_R = [num_elements(slices) for slices in self._slices_R]

    def start_sum(self, part_Ec: Tensor, wire_dtype: torch.dtype) -> PendingExchange:
        """Begin to send each owner its rows of this group's sum."""
        sizes_R = [len(part_Ec) * size for size in self._num_elements_R]
        send = torch.empty(sum(sizes_R), dtype=wire_dtype, device=part_Ec.device)
        for block, slices in zip(send.split(sizes_R), self._slices_R, strict=True):
            torch.cat([part_Ec[:, own] for own in slices], dim=1, out=block.view(len(part_Ec), -1))
        return self._ranks.start_all_to_all(send, sizes_R, [sizes_R[self._ranks.rank]] * self._ranks.size)

    def finish_sum(self, received: Tensor, num_experts: int) -> Tensor:
        """The sum of all groups' sums, in the order of the groups: [E, elements that this rank owns], in float32 or
        wider."""
        received_REc = received.view(self._ranks.size, num_experts, self._num_elements_R[self._ranks.rank])
        total_Ec = received_REc[0].to(torch.promote_types(received.dtype, torch.float32), copy=True)
        for group_sum_Ec in received_REc[1:]:
            total_Ec += group_sum_Ec
        return total_Ec

    def start_gather(self, own_Ec: Tensor) -> PendingExchange:
        """Begin to send the rows that this rank owns to the other ranks that have the part."""
        # All ranks send equally much, as an all-gather needs.
        send = own_Ec.new_zeros(len(own_Ec) * max(self._num_elements_R))
        send[: own_Ec.numel()] = own_Ec.flatten()
        return self._ranks.start_all_gather(send)

    def finish_gather(self, received: Tensor, num_experts: int) -> Tensor:
        """[E, c]: the whole part."""
        part_Ec = received.new_empty(num_experts, sum(self._num_elements_R))
        for block, slices in zip(received, self._slices_R, strict=True):
            size = num_elements(slices)
            rows = block[: num_experts * size].view(num_experts, size)
            for own, piece in zip(slices, rows.split([s.stop - s.start for s in slices], dim=1), strict=True):
                part_Ec[:, own] = piece
        return part_Ec
