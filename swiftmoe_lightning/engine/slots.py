"""One layer's weights on this rank, in slots, and the two exchanges between them and the sharded parameters.

Rows travel between a rank's slots and the ranks of its group that own its part of them, by `direct_exchange` where
blocks are worth messages of their own, else by `packed_exchange`. With one expert group a rank owns its part; with
several, `ReplicaExchange` adds up and shares out between those that have the same one.

E experts, s slots of this rank, d different experts on it, r rows of a tensor that this rank owns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Final

import torch
from torch import Tensor

from swiftmoe_lightning.distributed import (
    ExpertGroup,
    PendingExchange,
    SideStream,
    local_shard,
    phase,
    side_stream,
    write_counts,
)
from swiftmoe_lightning.engine.direct_exchange import DirectCollection, DirectDistribution, travels_directly
from swiftmoe_lightning.engine.packed_exchange import PackedCollection, PackedDistribution
from swiftmoe_lightning.engine.replica_exchange import ReplicaExchange
from swiftmoe_lightning.placement import Placement, shard_rows

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
        placement: by which the slots are filled, or will be by the next distribution.
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
        self._stream = side_stream(device)
        self.placement = placement
        self.weights: dict[str, Tensor] = {}
        self._filled: Placement | None = None
        self._is_queued = False
        self._gather: tuple[ReplicaExchange, PendingExchange] | None = None
        self._distribution: DirectDistribution | PackedDistribution | None = None
        self._sent_versions: list[tuple[int, int]] = []
        self.bytes_sent = dict.fromkeys(PHASES, 0)

    def queue_distribution(self, placement: Placement) -> None:
        """The parameters were updated, and the slots will be filled by `placement`."""
        self.placement, self._is_queued = placement, True
        self._sent_versions = _versions(self._parameters())

    @torch.no_grad()
    def start_distribution(self, allows_writes: bool) -> None:
        """Begin to send this rank's rows of every expert to the ranks that have the expert in `placement`.

        With several groups it first shares rows between groups; `continue_distribution` then goes on.

        Args:
            allows_writes: parameters may have been written since the distribution was queued.
        """
        self.finish_distribution()
        with phase("distribute"), self._stream.after_model():
            parameters = self._parameters()
            is_new = self._is_queued or self._sent_versions != _versions(parameters)
            if allows_writes or not self._is_queued:
                self._sent_versions = _versions(parameters)
            if self.placement is self._filled and is_new:
                # Forwards with the old weights know them by this object.
                self.placement = copy.copy(self.placement)
            self._match_slots(parameters)
            self._filled, self._is_queued = self.placement, False
            # From CPU memory each layer's rows travel by themselves.
            shards = {
                name: local_shard(p).to(self._device, self.weights[name].dtype, non_blocking=True)
                for name, p in parameters.items()
            }
            if self._group.replicate is None:
                self._send_rows(shards)
            else:
                replicas = ReplicaExchange(self._group.replicate, self._part_shapes(self.weights))
                gather = replicas.start_gather(shards)
                self._gather = (replicas, gather)
                self.bytes_sent["gather"] += gather.bytes_sent

    @torch.no_grad()
    def continue_distribution(self) -> None:
        """Send the rows on to their ranks in this group, once they have come from the other groups."""
        if self._gather is not None:
            with phase("distribute"), self._stream.beside_model():
                (replicas, gather), self._gather = self._gather, None
                self._send_rows(replicas.finish_gather(gather.wait()))

    def _send_rows(self, part: Mapping[str, Tensor]) -> None:
        ranks = self._group.weights
        assert self._filled is not None
        slots = {name: weight.detach() for name, weight in self.weights.items()}
        travel = DirectDistribution if travels_directly(slots, ranks.size) else PackedDistribution
        self._distribution = travel(part, slots, self._filled, ranks)
        self.bytes_sent["distribute"] += self._distribution.bytes_sent

    @torch.no_grad()
    def finish_distribution(self) -> None:
        """Wait for weights that are being sent, if any."""
        self.continue_distribution()
        if self._distribution is not None:
            with phase("distribute"):
                distribution, self._distribution = self._distribution, None
                with self._stream.beside_model():
                    distribution.finish()
                self._stream.join()

    def holds(self, placement: Placement) -> bool:
        """Whether the slots still have the weights of the last forward under `placement`."""
        is_under_way = self._is_queued or self._gather is not None or self._distribution is not None
        return not is_under_way and placement is self._filled

    def join(self, totals: Collection[Tensor]) -> None:
        """Let the model's stream, or the CPU, wait for the sums of a collection."""
        self._stream.join(totals)

    @property
    def is_outdated(self) -> bool:
        """Whether parameters were written in place since they were last sent, or queued to be."""
        return self._sent_versions != _versions(self._parameters())

    @property
    def has_gradients(self) -> bool:
        """Whether backward has left gradients in the slots that have not been collected."""
        return any(w.grad is not None for w in self.weights.values())

    @torch.no_grad()
    def start_collection(self) -> PendingCollection | None:
        """Begin to send each gradient's rows to the ranks that own them, and remove the gradients from the slots.

        Returns:
            None when there are none.
        """
        gradients = {name: w.grad for name, w in self.weights.items() if w.grad is not None}
        if not gradients:
            return None
        assert self._filled is not None
        with phase("collect"), self._stream.after_model():
            for name in gradients:
                self.weights[name].grad = None
            dtype = next(iter(gradients.values())).dtype
            wire_dtype = torch.float64 if dtype == torch.float64 else self._wire_dtype
            ranks = self._group.weights
            is_direct = dtype == wire_dtype and dtype.itemsize >= torch.float32.itemsize
            collection: DirectCollection | PackedCollection
            if is_direct and travels_directly(gradients, ranks.size):
                collection = DirectCollection(gradients, self._filled, ranks)
            else:
                collection = PackedCollection(gradients, self._filled, ranks, wire_dtype)
            self.bytes_sent["collect"] += collection.bytes_sent
            replicas = None
            if self._group.replicate is not None:
                replicas = ReplicaExchange(self._group.replicate, self._part_shapes(gradients))
            return PendingCollection(collection, replicas, wire_dtype, self.bytes_sent, self._stream)

    def _part_shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
        """Name -> [E, rows of this rank's part, ...]."""
        shapes, ranks = {}, self._group.expert
        for name, tensor in tensors.items():
            first, last = shard_rows(tensor.shape[1], ranks.size)[ranks.rank]
            shapes[name] = torch.Size((self.placement.num_experts, last - first, *tensor.shape[2:]))
        return shapes

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

    Contributions are added in rank order, in float32 or wider, so sums do not depend on their arrival. On a GPU they
    are added on the side stream: the model's waits for them, and the CPU does not.

    Args:
        collection: in the group.
        replicas: between groups; None for one group.
        wire_dtype: in which gradients travel.
        bytes_sent: as of `ExpertSlots`; changed in place.
        stream: on which sums are taken.

    Attributes:
        discarded: names of gradients that the user has discarded meanwhile.
    """

    def __init__(
        self,
        collection: DirectCollection | PackedCollection,
        replicas: ReplicaExchange | None,
        wire_dtype: torch.dtype,
        bytes_sent: dict[str, int],
        stream: SideStream,
    ) -> None:
        self._collection: DirectCollection | PackedCollection | None = collection
        self._replicas, self._wire_dtype, self._bytes_sent = replicas, wire_dtype, bytes_sent
        self._stream = stream
        self._between: PendingExchange | None = None
        self._totals: dict[str, Tensor] | None = None
        self.discarded: set[str] = set()

    def advance(self) -> bool:
        """Wait for the exchange under way. Returns whether it was the last one; else the one between groups begins."""
        # Freed at the end, when the model's stream has waited: the gradients that were sent, and buffers.
        collection, self._collection = self._collection, None
        with self._stream.beside_model():
            if collection is not None:
                sums = collection.finish()
                if self._replicas is None:
                    self._totals = sums
                else:
                    self._between = self._replicas.start_sum(sums, self._wire_dtype)
                    self._bytes_sent["reduce"] += self._between.bytes_sent
            elif self._replicas is not None and self._between is not None:
                self._totals = self._replicas.finish_sum(self._between.wait())
        self._stream.join()
        return self._totals is not None

    def means(self, num_ranks: int, device: torch.device) -> dict[str, Tensor]:
        """Each expert's gradient, after the last exchange: the mean over all ranks with tokens of their own, as in DDP.

        Args:
            num_ranks: how many those are.
            device: of the sharded parameters.

        Returns:
            Name -> [E, r, ...], of those that are not discarded; to be used after the stream's `join`.
        """
        assert self._totals is not None
        kept = {name: total for name, total in self._totals.items() if name not in self.discarded}
        with self._stream.beside_model():
            return {name: self._stream.to(total.div_(num_ranks), device) for name, total in kept.items()}


def _versions(parameters: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    return [write_counts(parameter) for parameter in parameters.values()]
