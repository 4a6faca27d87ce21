"""One layer's experts cut by their hidden dim: carries out who sends whom which piece of them.

W ranks of the group, E experts, s slots of this rank, n experts of one message.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import RankGroup, to_device
from swiftmoe_lightning.modules import HiddenCut
from swiftmoe_lightning.placement import Placement, piece_senders


class _Message(NamedTuple):
    """What one rank sends to another, or where that goes.

    Attributes:
        parts: views [E or s, ...].
        where: [n] int64, which of the first dim's.
    """

    parts: Sequence[Tensor]
    where: np.ndarray


class HiddenPieces:
    """This rank's pieces of all experts, made from the ranks' slots, and put back into them.

    Args:
        cuts: how each tensor of an expert is cut.
        ranks: of the group.
        device: of the slots.

    Attributes:
        weights: name -> [E, ...]; none while experts are whole.
    """

    def __init__(self, cuts: Mapping[str, HiddenCut], ranks: RankGroup, device: torch.device) -> None:
        self._cuts = cuts
        self.weights: dict[str, Tensor] = {}
        # In forwards and backwards pieces travel among tokens; before a distribution, among weights.
        self._among_tokens, self._among_weights = RankGroup(ranks.process_group), ranks.second(device.type)

    def take(self, weights: Mapping[str, Tensor], placement: Placement) -> int:
        """Make the pieces, and take the slots' memory. A collective.

        Args:
            weights: name -> slots [s, ...], filled.
            placement: of the slots.

        Returns:
            Bytes sent to other ranks.
        """
        slots, ranks = {name: slot.data for name, slot in weights.items()}, self._among_tokens
        rank, size = ranks.rank, ranks.size
        sender_WE, mine = piece_senders(placement), placement.experts_of(rank)
        self.weights = {name: self._empty(name, slot, placement.num_experts, ranks) for name, slot in slots.items()}
        send, receive = [], []
        for other in range(size):
            parts = [part for name, slot in slots.items() for part in self._cuts[name].parts(slot, size, other)]
            send.append(_Message(parts, np.flatnonzero(sender_WE[other, mine] == rank)))
            receive.append(_Message(self._own_parts(slots, ranks), np.flatnonzero(sender_WE[rank] == other)))
        bytes_sent = _exchange(ranks, send, receive)
        for slot in weights.values():
            slot.untyped_storage().resize_(0)
        return bytes_sent

    def give_back(
        self, weights: Mapping[str, Tensor], names: Collection[str], placement: Placement, among_weights: bool
    ) -> int:
        """Give all slots memory, put pieces back into some, and forget them. A collective, unless none is wanted.

        Args:
            weights: name -> slots [s, ...].
            names: of the tensors that are wanted; the same on all ranks.
            placement: that the pieces were made by.
            among_weights: the exchange is one of those of weights, and not of tokens.

        Returns:
            Bytes sent to other ranks.
        """
        ranks = self._among_weights if among_weights else self._among_tokens
        rank, size = ranks.rank, ranks.size
        for slot in weights.values():
            if not slot.untyped_storage().nbytes():
                slot.untyped_storage().resize_(slot.nbytes)
                # Not an in-place write in the eyes of autograd: a forward may have saved the slots for its backward.
                slot.data.zero_()
        slots = {name: slot.data for name, slot in weights.items() if name in names}
        mine = placement.experts_of(rank)
        for name in [name for name in slots if self._cuts[name].dim is None]:
            slots[name][: len(mine)] = self.weights[name][to_device(slots[name].device, mine)[0]]
        cut = {name: slot for name, slot in slots.items() if self._cuts[name].dim is not None}
        own = self._own_parts(cut, ranks)
        self.weights = {}
        if not cut:
            return 0
        send, receive = [], []
        for other in range(size):
            parts = [part for name, slot in cut.items() for part in self._cuts[name].parts(slot, size, other)]
            send.append(_Message(own, placement.experts_of(other)))
            receive.append(_Message(parts, np.arange(len(mine))))
        return _exchange(ranks, send, receive)

    def _empty(self, name: str, slot: Tensor, num_experts: int, ranks: RankGroup) -> Tensor:
        shape, cut = [num_experts, *slot.shape[1:]], self._cuts[name]
        if cut.pads:
            return slot.new_zeros(shape)
        if cut.dim is not None:
            shape[cut.dim] = sum(part.shape[cut.dim] for part in cut.parts(slot, ranks.size, ranks.rank))
        return slot.new_empty(shape)

    def _own_parts(self, names: Collection[str], ranks: RankGroup) -> list[Tensor]:
        """Views of this rank's pieces [E, ...], as `HiddenCut.parts` cuts whole tensors."""
        parts: list[Tensor] = []
        for name in names:
            piece, cut = self.weights[name], self._cuts[name]
            if cut.pads:
                parts += cut.parts(piece, ranks.size, ranks.rank)
            elif cut.dim is not None and cut.layout == "halves":
                half = piece.shape[cut.dim] // 2
                parts += [piece.narrow(cut.dim, first, half) for first in (0, half)]
            else:
                parts.append(piece)
        return parts


def _exchange(ranks: RankGroup, send: Sequence[_Message], receive: Sequence[_Message]) -> int:
    """Copy what is sent to each rank to where it goes there. Messages stand in the order of the ranks.

    Returns:
        Bytes sent to other ranks.
    """
    device, rank = receive[0].parts[0].device, ranks.rank
    indices = to_device(device, *(message.where for message in [*send, *receive]))
    send_indices, receive_indices = indices[: ranks.size], indices[ranks.size :]
    chunks, send_splits, receive_splits = [], [], []
    for other in range(ranks.size):
        sent = [part.index_select(0, send_indices[other]) for part in send[other].parts]
        if other == rank:
            for part, values in zip(receive[rank].parts, sent, strict=True):
                part.index_copy_(0, receive_indices[rank], values)
            sent = []
        chunks += [values.flatten() for values in sent]
        send_splits.append(sum(values.numel() for values in sent))
        per_expert = sum(part[0].numel() for part in receive[other].parts)
        receive_splits.append(0 if other == rank else per_expert * len(receive[other].where))
    exchange = ranks.start_all_to_all(torch.cat(chunks), send_splits, receive_splits)

    for other, values in enumerate(exchange.wait().split(receive_splits)):
        if other != rank:
            parts, num = receive[other].parts, len(receive[other].where)
            sizes = [num * part[0].numel() for part in parts]
            for part, chunk in zip(parts, values.split(sizes), strict=True):
                part.index_copy_(0, receive_indices[other], chunk.view(num, *part.shape[1:]))
    return exchange.bytes_sent
