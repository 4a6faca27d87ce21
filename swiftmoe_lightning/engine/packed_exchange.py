"""The two weight exchanges as one all-to-all each, packed into one buffer; on any backend, of any dtypes.

In each exchange a rank has two buffers. One is of the whole experts in its slots, whose rows lie as `plan_buffer` says.
The other is of its part of every expert's rows: [P, c], for each pair these rows of the pair's expert.

W ranks, E experts, s slots of this rank, d different experts on it, P (rank, expert) pairs of the group, r rows of a
tensor that this rank owns, c elements of one expert in these rows, over all its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.distributed import RankGroup, to_device
from swiftmoe_lightning.ops import reused_empty
from swiftmoe_lightning.placement import Placement, arriving_indices, plan_buffer, plan_collection, plan_distribution


class PackedDistribution:
    """Weights on their way from the owners of their rows into this rank's slots.

    Args:
        shards: name -> [E, r, ...], this rank's rows of every expert.
        slots: name -> [s, rows, ...], which will have the weights; of the shards' dtype.
        placement: of the slots.
        ranks: of the group.
        arrives_P: [P] bool, the pairs whose weights are sent; None for all. The slots of the others stay as they are.

    Attributes:
        bytes_sent: to other ranks.
    """

    def __init__(
        self,
        shards: Mapping[str, Tensor],
        slots: Mapping[str, Tensor],
        placement: Placement,
        ranks: RankGroup,
        arrives_P: np.ndarray | None = None,
    ) -> None:
        self._slots, self._ranks = slots, ranks
        self._indices = arriving_indices(placement, ranks.rank, arrives_P)
        plan = plan_distribution(placement, _row_elements(slots), arrives_P)
        flat = [shard.flatten(1) for shard in shards.values()]
        (expert_P,) = to_device(
            flat[0].device, placement.pair_expert_P if arrives_P is None else placement.pair_expert_P[arrives_P]
        )
        shape = (len(expert_P), sum(shard_Ec.shape[1] for shard_Ec in flat))
        send_Pc = reused_empty(shape, flat[0].dtype, flat[0].device)
        columns = send_Pc.split([shard_Ec.shape[1] for shard_Ec in flat], dim=1)
        for shard_Ec, column_Pc in zip(flat, columns, strict=True):
            torch.index_select(shard_Ec, 0, expert_P, out=column_Pc)
        self._exchange = ranks.start_all_to_all(
            send_Pc.flatten(), plan.send_splits(ranks.rank), plan.receive_splits(ranks.rank)
        )
        self.bytes_sent = self._exchange.bytes_sent

    def finish(self) -> None:
        """Wait for the weights, and copy them to the slots."""
        for part, rows in _rows_in(self._exchange.wait(), self._slots, self._indices, self._ranks):
            rows.copy_(part)


class PackedCollection:
    """Gradients on their way from the ranks that have an expert to the owners of its rows.

    Args:
        gradients: name -> [s, rows, ...], of this rank's slots.
        placement: of the gradients.
        ranks: of the group.
        wire_dtype: in which they travel.

    Attributes:
        bytes_sent: to other ranks.
    """

    def __init__(
        self, gradients: Mapping[str, Tensor], placement: Placement, ranks: RankGroup, wire_dtype: torch.dtype
    ) -> None:
        # The gradients stay until the end: a side stream may copy them after the model's has gone on.
        self._placement, self._gradients = placement, gradients
        plan = plan_collection(placement, _row_elements(gradients))
        device, splits = next(iter(gradients.values())).device, plan.send_splits(ranks.rank)
        send = reused_empty((sum(splits),), wire_dtype, device)
        for part, rows in _rows_in(send, gradients, arriving_indices(placement, ranks.rank, None), ranks):
            part.copy_(rows)
        self._exchange = ranks.start_all_to_all(send, splits, plan.receive_splits(ranks.rank))
        self.bytes_sent = self._exchange.bytes_sent
        self._shapes = {}
        for name, gradient in gradients.items():
            own = ranks.own_rows(gradient.shape[1])
            self._shapes[name] = (own.stop - own.start, *gradient.shape[2:])

    def finish(self) -> dict[str, Tensor]:
        """Wait for all rows. Returns name -> [E, r, ...], the sum of each expert's pairs, in rank order.

        Sums are taken in float32 or wider, so they do not depend on who arrives first.
        """
        widths = [math.prod(shape) for shape in self._shapes.values()]
        total_Ec = _sum_over_ranks(self._exchange.wait().view(self._placement.num_pairs, sum(widths)), self._placement)
        return {
            name: part_Ec.contiguous().view(len(part_Ec), *shape)
            for (name, shape), part_Ec in zip(self._shapes.items(), total_Ec.split(widths, dim=1), strict=True)
        }


def _rows_in(
    buffer: Tensor, tensors: Mapping[str, Tensor], indices: np.ndarray, ranks: RankGroup
) -> Iterator[tuple[Tensor, Tensor]]:
    """(piece of the buffer, rows of a tensor that lie there), both as [peers, experts, rows, ...] views.

    Args:
        buffer: of the experts at `indices`.
        tensors: name -> [s, rows, ...].
        indices: ascending. Neighbours among them share a view.
        ranks: of the group.
    """
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    lengths = [len(run) for run in runs]
    for block in plan_buffer(_row_elements(tensors), ranks.size, len(indices)):
        shape = (len(block.peers), len(indices), sum(block.widths))
        elements = buffer[block.offset : block.offset + math.prod(shape)]
        pieces = elements.view(shape).split(list(block.widths), dim=2)
        for tensor, rows, piece in zip(tensors.values(), block.rows, pieces, strict=True):
            if rows and len(indices):
                rows_of_peers = tensor[:, rows.start : rows.stop].unflatten(1, (len(block.peers), -1))
                by_peer = rows_of_peers.transpose(0, 1)
                parts = piece.unflatten(2, by_peer.shape[2:]).split(lengths, dim=1)
                for run, part in zip(runs, parts, strict=True):
                    yield part, by_peer[:, run[0] : run[-1] + 1]


def _sum_over_ranks(received_Pc: Tensor, placement: Placement) -> Tensor:
    """[P, c] -> [E, c], in float32 or wider: the sum of each expert's pairs, in rank order."""
    order_P, first_E = to_device(received_Pc.device, placement.by_expert_P, placement.first_pair_E)
    wide = torch.promote_types(received_Pc.dtype, torch.float32)
    # One gather of all pairs, which adds up as it reads.
    return F.embedding_bag(order_P, received_Pc.to(wide), first_E, mode="sum")


def _row_elements(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.shape[1], tensor.shape[2:].numel()) for tensor in tensors.values())
