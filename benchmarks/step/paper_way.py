"""The paper's way of both weight phases (SYMI, arXiv 2504.19925), for times and bytes beside ours.

Gradients: an all-reduce over each expert's ranks, in groups that were registered beforehand; then every owner of rows
fetches them from one of those ranks, itself where it can. Weights: every owner sends its rows to every slot, also to
several slots of one rank. Nothing is packed: rows lie as they are sent. All layers' all-reduces are under way at once,
and all messages of a phase. W ranks, E experts, P (rank, expert) pairs, d experts of a rank, s slots of a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from swiftmoe_lightning import Placement
from swiftmoe_lightning.placement.transfer import shard_rows


@dataclass(frozen=True)
class Message:
    """The rows that one rank owns of one expert, from a rank to a rank.

    Attributes:
        expert: which.
        source: the sending rank.
        destination: the receiving rank.
        owner: whose rows they are.
        slot: of the destination, for weights; 0 for gradients.
    """

    expert: int
    source: int
    destination: int
    owner: int
    slot: int = 0


def plan_fetches(placement: Placement) -> list[Message]:
    """Who sends each owner its rows of each expert's summed gradient: the owner itself, or one of the expert's ranks,
    each for as many owners as the others.

    Args:
        placement: which ranks have which expert.
    """
    fetches = []
    for expert, hosts in enumerate(hosts_of(placement)):
        for owner in range(placement.world_size):
            source = owner if owner in hosts else hosts[owner % len(hosts)]
            fetches.append(Message(expert, source, owner, owner))
    return fetches


def plan_weights(placement: Placement) -> list[Message]:
    """Every owner's rows to every slot of the expert, in the order of the slots.

    Args:
        placement: which slots have which expert.
    """
    return [
        Message(expert, owner, rank, owner, slot)
        for rank, table_s in enumerate(placement.table_Ws.tolist())
        for slot, expert in enumerate(table_s)
        for owner in range(placement.world_size)
    ]


def hosts_of(placement: Placement) -> list[list[int]]:
    """[E] the ranks of each expert, ascending."""
    pairs_P = placement.by_expert_P
    ranks = np.split(placement.pair_rank_P[pairs_P], placement.first_pair_E[1:])
    return [ranks_of_expert.tolist() for ranks_of_expert in ranks]


class RegisteredGroups:
    """A process group for every range of consecutive ranks, all made beforehand. A collective."""

    def __init__(self) -> None:
        ranks = range(dist.get_world_size())
        self._groups = {
            (first, last): dist.new_group(list(range(first, last + 1)))
            for first in ranks
            for last in ranks[first + 1 :]
        }

    def of(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """The group of these ranks.

        Raises:
            ValueError: for ranks that are not neighbours: placements of this way lay an expert's slots side by side.
        """
        if len(ranks) != ranks[-1] - ranks[0] + 1:
            raise ValueError(f"ranks {list(ranks)} are not consecutive, and no group of them was registered.")
        return self._groups[ranks[0], ranks[-1]]


class PaperLayer:
    """One layer's tensors on this rank, and both phases.

    Args:
        placement: where the experts are, an expert's slots side by side.
        shapes: of an expert's tensors, rows first; W divides the rows.
        groups: for the all-reduces.

    Attributes:
        gradients: one tensor [d, ...] for each shape, of the experts on this rank, ascending.
        shard_gradients: one [E, rows / W, ...] for each, this rank's rows of all experts; the mean over ranks.
        shards: the same of the weights.
        slots: one [s, ...] for each.
        bytes_sent: to other ranks by both phases so far; an all-reduce over r ranks sends 2 (r - 1) / r of its bytes
            from each.
    """

    def __init__(self, placement: Placement, shapes: Sequence[Sequence[int]], groups: RegisteredGroups) -> None:
        self._placement, self._groups, self._rank = placement, groups, dist.get_rank()
        world_size, num_experts = placement.world_size, placement.num_experts
        uneven = [tuple(shape) for shape in shapes if shape[0] % world_size]
        assert not uneven, f"{world_size} ranks must divide the rows of {uneven}"
        self._experts = placement.experts_of(self._rank).tolist()
        self._rows = [[slice(*bounds) for bounds in shard_rows(shape[0], world_size)] for shape in shapes]
        self.gradients = [torch.zeros(len(self._experts), *shape) for shape in shapes]
        self.shard_gradients, self.shards = (
            [torch.zeros(num_experts, shape[0] // world_size, *shape[1:]) for shape in shapes] for _ in range(2)
        )
        self.slots = [torch.zeros(placement.slots_per_rank, *shape) for shape in shapes]
        self._fetches, self._weights = plan_fetches(placement), plan_weights(placement)
        self.bytes_sent = 0

    def start_sums(self) -> list[dist.Work]:
        """Begin to sum each expert's gradients over its ranks."""
        works = []
        hosts_E = hosts_of(self._placement)
        for local, expert in enumerate(self._experts):
            hosts = hosts_E[expert]
            if len(hosts) > 1:
                for gradient in self.gradients:
                    works.append(dist.all_reduce(gradient[local], group=self._groups.of(hosts), async_op=True))
                    self.bytes_sent += 2 * (len(hosts) - 1) * gradient[local].nbytes // len(hosts)
        return works

    def fetch_gradients(self) -> list[dist.P2POp]:
        """The messages in which this rank sends and gets rows of summed gradients; its own it copies."""
        operations = []
        for tag, message in enumerate(self._fetches):
            for own, shard, rows in zip(self.gradients, self.shard_gradients, self._rows, strict=True):
                target = shard[message.expert]
                if message.source == self._rank:
                    sent = own[self._experts.index(message.expert), rows[message.owner]]
                    operations += self._sent(sent, message, target, tag)
                elif message.destination == self._rank:
                    operations.append(dist.P2POp(dist.irecv, target, message.source, tag=tag))
        return operations

    def send_weights(self) -> list[dist.P2POp]:
        """The messages in which this rank sends and gets rows of weights; its own it copies."""
        operations = []
        for tag, message in enumerate(self._weights):
            for shard, slots, rows in zip(self.shards, self.slots, self._rows, strict=True):
                target = slots[message.slot, rows[message.owner]]
                if message.source == self._rank:
                    operations += self._sent(shard[message.expert], message, target, tag)
                elif message.destination == self._rank:
                    operations.append(dist.P2POp(dist.irecv, target, message.source, tag=tag))
        return operations

    def _sent(self, sent: Tensor, message: Message, target: Tensor, tag: int) -> list[dist.P2POp]:
        if message.destination == self._rank:
            target.copy_(sent)
            return []
        self.bytes_sent += sent.nbytes
        return [dist.P2POp(dist.isend, sent, message.destination, tag=tag)]


def run_both_phases(layers: Sequence[PaperLayer]) -> None:
    """Gradients of all layers to their owners, then weights of all layers to the slots. A collective.

    Args:
        layers: in the same order on all ranks.
    """
    sums = [layer.start_sums() for layer in layers]
    messages: list[dist.Work] = []
    for layer, under_way in zip(layers, sums, strict=True):
        for work in under_way:
            work.wait()
        messages += _start(layer.fetch_gradients())
    _wait(messages)
    for layer in layers:
        for gradient in layer.shard_gradients:
            gradient.div_(dist.get_world_size())
    _wait([work for layer in layers for work in _start(layer.send_weights())])


def _start(operations: list[dist.P2POp]) -> list[dist.Work]:
    return dist.batch_isend_irecv(operations) if operations else []


def _wait(works: list[dist.Work]) -> None:
    for work in works:
        work.wait()
