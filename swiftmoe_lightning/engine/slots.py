"""One layer's weights on this rank, in slots, and when they are exchanged with the sharded parameters.

s slots of this rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup, local_shard, phase, side_stream, write_counts
from swiftmoe_lightning.engine.arrivals import move_in_slots
from swiftmoe_lightning.engine.hidden_pieces import HiddenPieces
from swiftmoe_lightning.engine.weight_exchange import PendingCollection, PendingDistribution, WeightPath
from swiftmoe_lightning.engine.weight_paths import WeightPaths
from swiftmoe_lightning.placement import Placement, plan_moves


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
        pieces: of the experts, for `cut`; None if they are never cut.

    Attributes:
        placement: by which the slots are filled, or will be by the next distribution.
        weights: name -> slots.
        device: of the slots.
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
        pieces: HiddenPieces | None = None,
    ) -> None:
        self._parameters, self._group, self.device = parameters, group, device
        self._param_dtype, self._wire_dtype = param_dtype, wire_dtype
        self._stream = side_stream(device)
        self.placement = placement
        self.weights: dict[str, Tensor] = {}
        self._filled: Placement | None = None
        self._is_queued = False
        self._is_freed = False
        # Of what has changed; of what has not, to ranks that did not have it.
        self._distributions: list[PendingDistribution] = []
        self._sent_versions: dict[str, tuple[int, int]] = {}
        # Names of what was updated since it was last sent, alike on all ranks; None is everything.
        self._updated: set[str] | None = None
        self._arrives_E = np.zeros(placement.num_experts, dtype=bool)
        self._paths = WeightPaths(group, self._stream)
        self.bytes_sent = self._paths.bytes_sent
        self.pieces = pieces

    def arrivals(self, placement: Placement) -> np.ndarray:
        """[E] bool: the experts that a rank of the group will have by `placement` and does not have in its slots."""
        arrives_E = np.zeros(placement.num_experts, dtype=bool)
        if self._filled is not None:
            arrives_E[placement.pair_expert_P[self._filled.arrivals(placement)]] = True
        return arrives_E

    def queue_distribution(self, placement: Placement, updated: Collection[str], arrives_E: np.ndarray) -> None:
        """The slots will be filled by `placement`.

        Args:
            placement: the next one.
            updated: names of the parameters that have changed, the same on all ranks. The others are sent to ranks that
                do not have the expert.
            arrives_E: [E] bool, `arrivals` of this group, or of all, which send each other weights.
        """
        self.placement, self._is_queued, self._arrives_E = placement, True, arrives_E
        if self._updated is not None:
            self._updated.update(updated)
        parameters = self._parameters()
        self._note_versions(parameters, self._names_to_send(parameters))

    def queue_refill(self) -> None:
        """The next distribution sends all parameters. Call it on all ranks."""
        self._updated = None

    @property
    def has_memory(self) -> bool:
        """Whether the slots have been filled, or are being filled, since they were freed."""
        return self._filled is not None and not self._is_freed

    @property
    def is_current(self) -> bool:
        """Whether the slots have the weights of `placement`, or will have by those under way."""
        return self.has_memory and not self._is_queued

    def free(self) -> None:
        """Give back the slots' memory. Waits for weights under way; the next distribution sends all parameters.

        What autograd has saved of the slots is filled with them: it shares their storage, as under FSDP2.
        """
        self.finish_distribution()
        if self.has_memory:
            self._is_freed = True
            for slot in self.weights.values():
                slot.untyped_storage().resize_(0)

    @torch.no_grad()
    def start_distribution(self, allows_writes: bool) -> bool:
        """Begin to send this rank's rows of every expert to the ranks that have the expert in `placement`.

        Args:
            allows_writes: parameters may have been written since the distribution was queued.

        Returns:
            Whether all parameters are sent whole: those that are frozen stay with the ranks that have them.
        """
        self.finish_distribution()
        parameters = self._parameters()
        is_new = self._is_queued or self._sent_versions != _versions(parameters)
        # What was freed comes back as it was.
        is_refill = self._is_freed and not self._is_queued and self._updated is not None
        if self.placement is self._filled and is_new:
            # Forwards with the old weights know them by this object.
            self.placement = copy.copy(self.placement)
        # On the model's stream, to which their memory returns.
        if self._match_slots(parameters):
            self._updated = None
        names = self._names_to_send(parameters)
        kept = [name for name in parameters if name not in names]
        if allows_writes or not (self._is_queued or is_refill):
            self._note_versions(parameters, names)
        with phase("distribute"), self._stream.after_model():
            if self.is_cut:
                self._take_back(kept, among_weights=True)
            path, before = self._paths.to(self.placement), self._filled
            self._filled, self._is_queued, self._updated, self._is_freed = self.placement, False, set(), False
            if kept and before is not None:
                # First, for what arrives may come straight into slots.
                moves = plan_moves(before, self.placement, self._group.expert.rank)
                move_in_slots([self.weights[name].detach() for name in kept], moves)
                if self._arrives_E.any():
                    arrivals = self._paths.of_arrivals(before, self.placement, self._arrives_E)
                    self._distribute(kept, arrivals, is_refill)
            if names:
                self._distribute(names, path, is_refill)
        if not self._distributions:
            # Nothing to finish before the next forward, but maybe moves.
            self._stream.join()
        return not kept

    def _names_to_send(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """The parameters whose slots have other values than the next distribution brings. The same on all ranks."""
        if self._updated is None or self._is_freed:
            return list(parameters)
        return [name for name in parameters if name in self._updated]

    def _distribute(self, names: Collection[str], path: WeightPath, is_refill: bool) -> None:
        parameters = self._parameters()
        # From CPU memory each layer's rows travel by themselves.
        shards = {
            name: local_shard(parameters[name]).to(self.device, self.weights[name].dtype, non_blocking=True)
            for name in names
        }
        # A write to `.data` does not count as one: autograd may use what it has saved of slots that are refilled.
        slots = {name: self.weights[name].data if is_refill else self.weights[name].detach() for name in names}
        self._distributions.append(PendingDistribution(shards, slots, path))

    def _note_versions(self, parameters: Mapping[str, Tensor], names: Collection[str]) -> None:
        versions = _versions(parameters)
        self._sent_versions.update({name: versions[name] for name in names})

    @torch.no_grad()
    def continue_distribution(self) -> None:
        """Let weights under way go on, if they have not reached their last leg: see `PendingDistribution.advance`."""
        if self._distributions:
            with phase("distribute"), self._stream.beside_model():
                for distribution in self._distributions:
                    distribution.advance()

    @torch.no_grad()
    def finish_distribution(self) -> None:
        """Wait for weights that are being sent, if any."""
        if self._distributions:
            with phase("distribute"):
                distributions, self._distributions = self._distributions, []
                with self._stream.beside_model():
                    for distribution in distributions:
                        distribution.finish()
                self._stream.join()

    @property
    def is_cut(self) -> bool:
        """Whether pieces of all experts have taken the place of the slots, which have no memory then."""
        return self.pieces is not None and bool(self.pieces.weights)

    @torch.no_grad()
    def cut(self) -> None:
        """Exchange the experts in the slots for this rank's pieces of all experts, unless that is done. A collective.

        The slots, filled and not under way, give their memory back. `make_whole` or a distribution undoes it.
        """
        if self.pieces is None or self.is_cut:
            return
        assert self._filled is not None
        with phase("recut"), self._stream.after_model():
            self.bytes_sent["recut"] += self.pieces.take(self.weights, self._filled)
        self._stream.join()

    @torch.no_grad()
    def make_whole(self) -> None:
        """Put the pieces back together in the slots, if they are cut. A collective.

        Values and placement are those from before, so a forward from before can still have its backward.
        """
        if self.is_cut:
            with phase("recut"), self._stream.after_model():
                self._take_back(self.weights, among_weights=False)
            self._stream.join()

    def _take_back(self, names: Collection[str], among_weights: bool) -> None:
        assert self.pieces is not None
        assert self._filled is not None
        sent = self.pieces.give_back(self.weights, names, self._filled, among_weights)
        self.bytes_sent["recut"] += sent

    def holds(self, placement: Placement) -> bool:
        """Whether the slots have the weights of the last forward under `placement`, or had when they were freed."""
        return not self._is_queued and not self.is_cut and placement is self._filled

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
            is_double = next(iter(gradients.values())).dtype == torch.float64
            wire_dtype = torch.float64 if is_double else self._wire_dtype
            return PendingCollection(gradients, self._paths.to(self._filled), wire_dtype)

    def _match_slots(self, parameters: Mapping[str, Tensor]) -> bool:
        """Allocate the slots, again if the sharded parameters' dtype or sizes have changed. Returns whether it has.

        Without a dtype of their own they have the first parameter's: an adapter may be wider than what it adapts, and
        an expert's tensors travel together.
        """
        dtype, are_new = self._param_dtype or next(iter(parameters.values())).dtype, False
        for name, sharded in parameters.items():
            shape = (self.placement.slots_per_rank, *sharded.shape[1:])
            slot = self.weights.get(name)
            if slot is None or slot.dtype != dtype or slot.shape != shape:
                # Not an inference tensor, which could not be trained, even if the first forward is in inference mode.
                with torch.inference_mode(False):
                    self.weights[name] = torch.zeros(shape, dtype=dtype, device=self.device)
                are_new = True
            elif self._is_freed:
                slot.untyped_storage().resize_(slot.nbytes)
            self.weights[name].requires_grad_(sharded.requires_grad)
        return are_new


def _versions(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: write_counts(parameter) for name, parameter in parameters.items()}
