"""One layer's weights on this rank, in slots, and the two exchanges between them and the sharded parameters.

In each exchange a rank has two buffers. One is of the whole experts in its slots, whose rows lie as `plan_buffer` says.
The other is of the rows that it owns of every expert: [P, c], for each pair these rows of the pair's expert.

W ranks, E experts, s slots of this rank, d different experts on it, P (rank, expert) pairs, c elements that this rank
owns of one expert, over all its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup, PendingExchange, local_shard, write_counts
from swiftmoe_lightning.placement import Placement, plan_buffer, plan_collection, plan_distribution


class ExpertSlots:
    """Leaf tensors [s, rows, ...], one for each tensor of an expert; index i is the i-th expert on this rank.

    Their shape does not depend on the placement: slots of a rank with equal experts share one index, and the last
    indices are then unused.

    Args:
        parameters: returns name -> sharded [E, rows, ...], current ones, since dtype and device of a module may change.
        group: the ranks that exchange with this one.
        placement: the first.
        device: of the slots.
        param_dtype: dtype of the slots; None means the sharded parameters'.
        wire_dtype: dtype in which gradients are sent, except float64 ones.

    Attributes:
        weights: name -> slots.
        distribution_bytes: sent to other ranks so far by distributions.
        collection_bytes: sent to other ranks so far by collections.
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
        self._distribution: PendingExchange | None = None
        self._sent_versions: list[tuple[int, int]] = []
        self.distribution_bytes = 0
        self.collection_bytes = 0

    def start_distribution(self, placement: Placement) -> None:
        """Begin to send this rank's rows of every expert to the ranks that have the expert in `placement`."""
        self.move_to(placement)
        parameters = self._parameters()
        self._sent_versions = _versions(parameters)
        self._match_slots(parameters)
        dtype = next(iter(self.weights.values())).dtype
        # First one copy of every expert's rows, on the device and in the dtype to send; then one for each pair.
        rows_Ec = torch.cat([local_shard(p).flatten(1) for p in parameters.values()], dim=1).to(self._device, dtype)
        expert_P = torch.from_numpy(placement.pair_expert_P).to(self._device)
        send = rows_Ec.index_select(0, expert_P).flatten()
        plan = plan_distribution(placement, _row_elements(parameters))
        rank = self._group.rank
        self._distribution = self._group.start_weight_exchange(send, plan.send_splits(rank), plan.receive_splits(rank))
        self.distribution_bytes += self._distribution.bytes_sent

    def move_to(self, placement: Placement) -> None:
        """Let the next distribution fill the slots by `placement`.

        It first waits for weights that were sent by the old placement, which says how their buffer is laid out.
        """
        self.finish_distribution()
        self.placement = placement

    @torch.no_grad()
    def finish_distribution(self) -> None:
        """Wait for weights that are being sent, if any, and copy them to the slots."""
        if self._distribution is None:
            return
        received, self._distribution = self._distribution.wait(), None
        for part, rows in self._rows_in(received, self.weights):
            rows.copy_(part)

    def holds(self, placement: Placement) -> bool:
        """Whether the slots still have the weights of the last forward under `placement`."""
        return self._distribution is None and placement is self.placement

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
        row_elements = _row_elements({name: self.weights[name] for name in names})
        plan = plan_collection(self.placement, row_elements)
        is_double = self.weights[names[0]].dtype == torch.float64
        wire_dtype = torch.float64 if is_double else self._wire_dtype
        send = torch.empty(sum(plan.send_splits(self._group.rank)), dtype=wire_dtype, device=self._device)
        gradients = {name: gradient for name in names if (gradient := self.weights[name].grad) is not None}
        for part, rows in self._rows_in(send, gradients):
            part.copy_(rows)
        for name in names:
            self.weights[name].grad = None
        rank = self._group.rank
        pending = self._group.start_weight_exchange(send, plan.send_splits(rank), plan.receive_splits(rank))
        self.collection_bytes += pending.bytes_sent
        return PendingCollection(pending, self.placement, names)

    def _rows_in(self, buffer: Tensor, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(piece of the buffer, rows of a tensor that lie there), both as [peers, d, rows, ...] views."""
        num_experts = int(self.placement.num_pairs_W[self._group.rank])
        for block in plan_buffer(_row_elements(tensors), self._group.world_size, num_experts):
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
    """A layer's gradients on their way to the owners of their rows.

    Attributes:
        names: the tensors that have gradients.
    """

    def __init__(self, exchange: PendingExchange, placement: Placement, names: list[str]) -> None:
        self._exchange, self._placement, self.names = exchange, placement, names

    def wait(self, shard_shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Wait for each expert's gradient: the mean over ranks, as in DDP.

        Contributions are added in rank order, in float32 or wider, so the sum does not depend on their arrival.

        Args:
            shard_shapes: for each of `names`, the shape of this rank's shard.

        Returns:
            Name -> [E, this rank's rows, ...].
        """
        received = self._exchange.wait()
        expert_P = self._placement.pair_expert_P
        wide = torch.promote_types(received.dtype, torch.float32)
        replicas = [
            (torch.from_numpy(pairs).to(received.device), torch.from_numpy(expert_P[pairs]).to(received.device))
            for pairs in self._placement.pairs_by_replica_index
        ]
        widths = [shard_shapes[name][1:].numel() for name in self.names]
        totals = {}
        for name, part_Pc in zip(self.names, received.view(len(expert_P), -1).split(widths, dim=1), strict=True):
            shape = shard_shapes[name]
            # The first array has one pair of every expert, in the order of the experts.
            total_Ec = part_Pc.index_select(0, replicas[0][0]).to(wide)
            for pairs, experts in replicas[1:]:
                total_Ec.index_add_(0, experts, part_Pc.index_select(0, pairs).to(wide))
            totals[name] = total_Ec.div_(self._placement.world_size).view(shape)
        return totals


def _versions(parameters: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    return [write_counts(parameter) for parameter in parameters.values()]


def _row_elements(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, int], ...]:
    return tuple((tensor.shape[1], tensor.shape[2:].numel()) for tensor in tensors.values())
