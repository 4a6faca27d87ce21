"""One layer's weights on this rank, in slots, and the two exchanges between them and the sharded parameters.

In each exchange a rank has two buffers. One is of the whole experts in its slots, whose rows lie as `plan_buffer` says.
The other is of its part of every expert's rows: [P, c], for each pair these rows of the pair's expert. With one expert
group a rank owns its part; with several, `ReplicaExchange` adds up and shares out between those that have the same one.

W ranks, g ranks of the group, E experts, s slots of this rank, d different experts on it, P (rank, expert) pairs of the
group, c elements of one expert in this rank's part, over all its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup, PendingExchange, local_shard, write_counts
from swiftmoe_lightning.engine.replica_exchange import ReplicaExchange
from swiftmoe_lightning.placement import Placement, plan_buffer, plan_collection, plan_distribution

# What is sent: gradients in the expert group and between groups, then weights between groups and in the group.
PHASES: Final = ("collect", "reduce", "gather", "distribute")


class ExpertSlots:
    """Leaf tensors [s, rows, ...], one for each tensor of an expert; index i is the i-th expert on this rank.

    Their shape does not depend on the placement: slots of a rank with equal experts share one index, and the last
    indices are then unused.

    Args:
        parameters: returns name -> sharded [E, rows, ...], current ones, since dtype and device of a module may change.
        group: this rank's expert group, and those that share its rows.
        placement: the first.
        device: of the slots.
        param_dtype: dtype of the slots; None means the sharded parameters'.
        wire_dtype: dtype in which gradients are sent, except float64 ones.

    Attributes:
        weights: name -> slots.
        bytes_sent: phase -> bytes that this rank has sent to other ranks so far.
    """

    def __init__(
        self,
        parameters: Callable[[], Mapping[str, Tensor]],
        group: ExpertGroup,
        placement: Placement,
        device: torch.device,
        param_dtype: torch.dtype | None,
        wire_dtype: torch.dtype,
    ) -> None:
        self._parameters, self._group, self._device = parameters, group, device
        self._param_dtype, self._wire_dtype = param_dtype, wire_dtype
        self.placement = placement
        self.weights: dict[str, Tensor] = {}
        self._gather: PendingExchange | None = None
        self._distribution: PendingExchange | None = None
        self._sent_versions: list[tuple[int, int]] = []
        self.bytes_sent = dict.fromkeys(PHASES, 0)

    def start_distribution(self, placement: Placement) -> None:
        """Begin to send this rank's rows of every expert to the ranks that have the expert in `placement`.

        With several groups it first shares rows between groups; `continue_distribution` then goes on.
        """
        self.move_to(placement)
        parameters = self._parameters()
        self._sent_versions = _versions(parameters)
        self._match_slots(parameters)
        dtype = next(iter(self.weights.values())).dtype
        # First one copy of every expert's rows, on the device and in the dtype to send; then one for each pair.
        rows_Ec = torch.cat([local_shard(p).flatten(1) for p in parameters.values()], dim=1).to(self._device, dtype)
        if self._group.replicate is None:
            self._send_rows(rows_Ec)
        else:
            self._gather = self._replicas(parameters).start_gather(rows_Ec)
            self.bytes_sent["gather"] += self._gather.bytes_sent

    def continue_distribution(self) -> None:
        """Send the rows on to their ranks in this group, once they have come from the other groups."""
        if self._gather is not None:
            received, self._gather = self._gather.wait(), None
            parameters = self._parameters()
            self._send_rows(self._replicas(parameters).finish_gather(received, self.placement.num_experts))

    def _send_rows(self, rows_Ec: Tensor) -> None:
        expert_P = torch.from_numpy(self.placement.pair_expert_P).to(self._device)
        send = rows_Ec.index_select(0, expert_P).flatten()
        plan, ranks = plan_distribution(self.placement, _row_elements(self._parameters())), self._group.weights
        self._distribution = ranks.start_all_to_all(send, plan.send_splits(ranks.rank), plan.receive_splits(ranks.rank))
        self.bytes_sent["distribute"] += self._distribution.bytes_sent

    def _replicas(self, tensors: Mapping[str, Tensor]) -> ReplicaExchange:
        return ReplicaExchange(self._group, _row_elements(tensors))

    def move_to(self, placement: Placement) -> None:
        """Let the next distribution fill the slots by `placement`.

        It first waits for weights that were sent by the old placement, which says how their buffer is laid out.
        """
        self.finish_distribution()
        self.placement = placement

    @torch.no_grad()
    def finish_distribution(self) -> None:
        """Wait for weights that are being sent, if any, and copy them to the slots."""
        self.continue_distribution()
        if self._distribution is None:
            return
        received, self._distribution = self._distribution.wait(), None
        for part, rows in self._rows_in(received, self.weights):
            rows.copy_(part)

    def holds(self, placement: Placement) -> bool:
        """Whether the slots still have the weights of the last forward under `placement`."""
        return self._gather is None and self._distribution is None and placement is self.placement

    @property
    def is_outdated(self) -> bool:
        """Whether parameters were written in place since they were last sent, by an optimizer or otherwise."""
        return self._sent_versions != _versions(self._parameters())

    @property
    def has_gradients(self) -> bool:
        """Whether backward has left gradients in the slots that have not been collected."""
        return any(w.grad is not None for w in self.weights.values())

    def start_collection(self) -> PendingCollection | None:
        """Begin to send each gradient's rows to the ranks that own them, and remove the gradients from the slots.

        Returns:
            None when there are none.
        """
        names = [name for name, w in self.weights.items() if w.grad is not None]
        if not names:
            return None
        gradients = {name: gradient for name in names if (gradient := self.weights[name].grad) is not None}
        plan, ranks = plan_collection(self.placement, _row_elements(gradients)), self._group.weights
        is_double = self.weights[names[0]].dtype == torch.float64
        wire_dtype = torch.float64 if is_double else self._wire_dtype
        send = torch.empty(sum(plan.send_splits(ranks.rank)), dtype=wire_dtype, device=self._device)
        for part, rows in self._rows_in(send, gradients):
            part.copy_(rows)
        replicas = None if self._group.replicate is None else self._replicas(gradients)
        for name in names:
            self.weights[name].grad = None
        pending = ranks.start_all_to_all(send, plan.send_splits(ranks.rank), plan.receive_splits(ranks.rank))
        self.bytes_sent["collect"] += pending.bytes_sent
        return PendingCollection(pending, self.placement, names, replicas, self.bytes_sent)

    def _rows_in(self, buffer: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(piece of the buffer, rows of a tensor that lie there), both as [peers, d, rows, ...] views."""
        num_experts = int(self.placement.num_pairs_W[self._group.expert.rank])
        for block in plan_buffer(_row_elements(tensors), self._group.expert.size, num_experts):
            shape = (len(block.peers), num_experts, sum(block.widths))
            elements = buffer[block.offset : block.offset + math.prod(shape)]
            pieces = elements.view(shape).split(list(block.widths), dim=2)
            for tensor, rows, piece in zip(tensors.values(), block.rows, pieces, strict=True):
                if rows:
                    rows_of_peers = tensor[:num_experts, rows.start : rows.stop].unflatten(1, (len(block.peers), -1))
                    by_peer = rows_of_peers.transpose(0, 1)
                    yield piece.unflatten(2, by_peer.shape[2:]), by_peer

    def _match_slots(self, parameters: Mapping[str, Tensor]) -> None:
        """Allocate the slots, again if the sharded parameters' dtype or sizes have changed."""
        for name, sharded in parameters.items():
            dtype = self._param_dtype or sharded.dtype
            shape = (self.placement.slots_per_rank, *sharded.shape[1:])
            slot = self.weights.get(name)
            if slot is None or slot.dtype != dtype or slot.shape != shape:
                # Not an inference tensor, which could not be trained, even if the first forward is in inference mode.
                with torch.inference_mode(False):
                    self.weights[name] = torch.zeros(shape, dtype=dtype, device=self._device)
            self.weights[name].requires_grad_(sharded.requires_grad)


class PendingCollection:
    """A layer's gradients on their way to the owners of their rows: in the expert group, then between groups.

    Args:
        exchange: in the group.
        placement: of the gradients.
        names: the tensors that have gradients.
        replicas: between groups; None for one group.
        bytes_sent: as of `ExpertSlots`; changed in place.

    Attributes:
        names: the tensors that have gradients.
        is_between_groups: whether its sums travel between groups.
    """

    def __init__(
        self,
        exchange: PendingExchange,
        placement: Placement,
        names: list[str],
        replicas: ReplicaExchange | None,
        bytes_sent: dict[str, int],
    ) -> None:
        self._exchange, self._placement, self.names = exchange, placement, names
        self._replicas, self._bytes_sent = replicas, bytes_sent
        self.is_between_groups = False

    def start_sum_over_groups(self) -> None:
        """Begin to send this group's sums to the ranks that own their rows; with one group, nothing."""
        if self._replicas is None:
            return
        received = self._exchange.wait()
        (total_Ec,) = _sum_over_ranks([received.view(self._placement.num_pairs, -1)], self._placement)
        self._exchange = self._replicas.start_sum(total_Ec, received.dtype)
        self._bytes_sent["reduce"] += self._exchange.bytes_sent
        self.is_between_groups = True

    def wait(self, shard_shapes: Mapping[str, torch.Size], num_ranks: int) -> dict[str, Tensor]:
        """Wait for each expert's gradient: the mean over all ranks with tokens of their own, as in DDP.

        Contributions are added in rank order, in float32 or wider, so the sum does not depend on their arrival.

        Args:
            shard_shapes: for each of `names`, the shape of this rank's shard.
            num_ranks: how many those are.

        Returns:
            Name -> [E, this rank's rows, ...].
        """
        received = self._exchange.wait()
        widths = [shard_shapes[name][1:].numel() for name in self.names]
        if self._replicas is None:
            totals = _sum_over_ranks(received.view(self._placement.num_pairs, -1).split(widths, dim=1), self._placement)
        else:
            total_Ec = self._replicas.finish_sum(received, self._placement.num_experts)
            totals = [part_Ec.contiguous() for part_Ec in total_Ec.split(widths, dim=1)]
        return {
            name: total_Ec.div_(num_ranks).view(shard_shapes[name])
            for name, total_Ec in zip(self.names, totals, strict=True)
        }


def _sum_over_ranks(parts: Sequence[Tensor], placement: Placement) -> list[Tensor]:
    """Each [P, columns] -> [E, columns], in float32 or wider: the sum of each expert's pairs, in rank order."""
    device, expert_P = parts[0].device, placement.pair_expert_P
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    replicas = [
        (torch.from_numpy(pairs).to(device), torch.from_numpy(expert_P[pairs]).to(device))
        for pairs in placement.pairs_by_replica_index
    ]
    totals = []
    for part_Pc in parts:
        # The first array has one pair of every expert, in the order of the experts.
        total_Ec = part_Pc.index_select(0, replicas[0][0]).to(wide)
        for pairs, experts in replicas[1:]:
            total_Ec.index_add_(0, experts, part_Pc.index_select(0, pairs).to(wide))
        totals.append(total_Ec)
    return totals


def _versions(parameters: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    return [write_counts(parameter) for parameter in parameters.values()]


def _row_elements(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.shape[1], tensor.shape[2:].numel()) for tensor in tensors.values())
