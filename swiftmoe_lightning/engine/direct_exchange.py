"""The two weight exchanges without a copy: every expert's rows travel from where they are to where they belong.

Each block, the rows of one tensor of one expert that one rank owns, is a message of its own, sent from the sharded
parameter and received in the slot, or sent from the slot's gradient and received in the sum. For groups whose messages
cost little beside a copy of large blocks: gloo's. `packed_exchange` is the reference.

E experts, P (rank, expert) pairs, d pairs of one rank, r rows of a tensor that this rank owns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from swiftmoe_lightning.distributed import RankGroup
from swiftmoe_lightning.ops import reused_empty
from swiftmoe_lightning.placement import Placement, arriving_indices, plan_messages


class DirectDistribution:
    """Weights on their way from the owners of their rows into this rank's slots.

    Args:
        shards: name -> [E, r, ...], this rank's rows of every expert. Nothing may write them before `finish()`.
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
        sources, targets = list(shards.values()), list(slots.values())
        num_rows = tuple(target.shape[1] for target in targets)
        messages = plan_messages(placement, num_rows, ranks.rank, arrives_P)
        self._works: list[Any] = []
        for block in messages.in_slots:
            self._works.append(ranks.start_receive(targets[block.tensor][block.index, block.rows], block.peer))
        self.bytes_sent = 0
        for shard in messages.in_shards:
            rows = sources[shard.tensor][shard.expert]
            self._works.append(ranks.start_send(rows, shard.peer))
            self.bytes_sent += rows.nbytes
        indices = arriving_indices(placement, ranks.rank, arrives_P)
        own_experts = list(zip(indices.tolist(), placement.experts_of(ranks.rank)[indices].tolist(), strict=True))
        for source, target in zip(sources, targets, strict=True):
            own = ranks.own_rows(target.shape[1])
            for index, expert in own_experts:
                target[index, own].copy_(source[expert])

    def finish(self) -> None:
        """Wait until the slots have the weights, and this rank's rows have left."""
        for work in self._works:
            work.wait()


class DirectCollection:
    """Gradients on their way from the ranks that have an expert to the owners of its rows.

    Args:
        gradients: name -> [s, rows, ...], of this rank's slots, float32 or float64. Nothing may write them before
            `finish()`.
        placement: of the gradients.
        ranks: of the group.

    Attributes:
        bytes_sent: to other ranks.
    """

    def __init__(self, gradients: Mapping[str, Tensor], placement: Placement, ranks: RankGroup) -> None:
        num_rows = tuple(gradient.shape[1] for gradient in gradients.values())
        messages = plan_messages(placement, num_rows, ranks.rank)
        self._works: list[Any] = []
        self.bytes_sent = 0
        self._own = [gradient[:, ranks.own_rows(gradient.shape[1])] for gradient in gradients.values()]
        self._totals = {
            name: reused_empty((placement.num_experts, *own.shape[1:]), own.dtype, own.device)
            for name, own in zip(gradients, self._own, strict=True)
        }
        # (sum, part, whether it is the sum's first) of what does not come in its sum, in rank order.
        self._left: list[tuple[Tensor, Tensor, bool]] = []
        parts_P = self._places(placement, ranks.rank)
        for shard in messages.in_shards:
            self._works.append(ranks.start_receive(parts_P[shard.pair][shard.tensor], shard.peer))
        sources = list(gradients.values())
        for block in messages.in_slots:
            rows = sources[block.tensor][block.index, block.rows]
            self._works.append(ranks.start_send(rows, block.peer))
            self.bytes_sent += rows.nbytes

    def _places(self, placement: Placement, rank: int) -> list[Sequence[Tensor]]:
        """[P] of one tensor [r, ...] for each gradient: where each pair's rows come.

        Those of an expert's first pair come in its sum; this rank's own stay where they are.
        """
        own_pairs = placement.pairs_of(rank, rank + 1)
        totals, shapes = list(self._totals.values()), [total.shape[1:] for total in self._totals.values()]
        num_others = placement.num_pairs - placement.num_experts
        scratch = reused_empty((num_others, sum(map(math.prod, shapes))), totals[0].dtype, totals[0].device)
        spare = iter(scratch)
        places: list[Sequence[Tensor]] = []
        pairs = zip(placement.pair_expert_P.tolist(), placement.is_first_pair_P.tolist(), strict=True)
        for pair, (expert, is_first) in enumerate(pairs):
            sums = [total[expert] for total in totals]
            if own_pairs.start <= pair < own_pairs.stop:
                parts = [own[pair - own_pairs.start] for own in self._own]
            elif is_first:
                parts = sums
            else:
                flat = next(spare).split([math.prod(shape) for shape in shapes])
                parts = [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]
            if parts is not sums:
                self._left += [(total, part, is_first) for total, part in zip(sums, parts, strict=True)]
            places.append(parts)
        return places

    def finish(self) -> dict[str, Tensor]:
        """Wait for all rows. Returns name -> [E, r, ...], the sum of each expert's pairs, in rank order."""
        for work in self._works:
            work.wait()
        for total, part, is_first in self._left:
            if is_first:
                total.copy_(part)
            else:
                total.add_(part)
        return self._totals


# A message is copied to the network by the thread that trains, a packed buffer by gloo's own: smaller blocks take the
# latter (two and four ranks of one machine, a core for each or for two).
_LEAST_MESSAGE = 512 * 1024


def travels_directly(tensors: Mapping[str, Tensor], world_size: int) -> bool:
    """Whether the blocks of experts are worth messages of their own; the same answer on all ranks.

    Args:
        tensors: name -> [experts, rows, ...], whole experts.
        world_size: ranks of the group.
    """
    some = next(iter(tensors.values()))
    block = sum(tensor[0].nbytes for tensor in tensors.values()) / len(tensors) / world_size
    return some.device.type == "cpu" and block >= _LEAST_MESSAGE
