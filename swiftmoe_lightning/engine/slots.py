"""One layer's weights on this rank, in slots, and when they are exchanged with the sharded parameters.

s slots of this rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup, local_shard, phase, side_stream, write_counts
from swiftmoe_lightning.engine.weight_exchange import (
    PHASES,
    PendingCollection,
    PendingDistribution,
    Stage,
    WeightPath,
)
from swiftmoe_lightning.placement import Placement, node_arrivals, node_placements, plan_moves


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
    ) -> None:
        self._parameters, self._group, self.device = parameters, group, device
        self._param_dtype, self._wire_dtype = param_dtype, wire_dtype
        self._stream = side_stream(device)
        self.placement = placement
        self.weights: dict[str, Tensor] = {}
        self._filled: Placement | None = None
        self._is_queued = False
        # Of what has changed; of what has not, to ranks that did not have it.
        self._distributions: list[PendingDistribution] = []
        self._stages: tuple[Placement, list[Stage]] | None = None
        self._sent_versions: dict[str, tuple[int, int]] = {}
        # Names of what was updated since it was last sent, alike on all ranks; None is everything.
        self._updated: set[str] | None = None
        self._arrives_E = np.zeros(placement.num_experts, dtype=bool)
        self.bytes_sent = dict.fromkeys(PHASES, 0)

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

    @torch.no_grad()
    def start_distribution(self, allows_writes: bool) -> bool:
        """Begin to send this rank's rows of every expert to the ranks that have the expert in `placement`.

        Args:
            allows_writes: parameters may have been written since the distribution was queued.

        Returns:
            Whether all parameters are sent whole: those that are frozen stay with the ranks that have them.
        """
        self.finish_distribution()
        with phase("distribute"), self._stream.after_model():
            parameters = self._parameters()
            is_new = self._is_queued or self._sent_versions != _versions(parameters)
            if self.placement is self._filled and is_new:
                # Forwards with the old weights know them by this object.
                self.placement = copy.copy(self.placement)
            if self._match_slots(parameters):
                self._updated = None
            names = self._names_to_send(parameters)
            if allows_writes or not self._is_queued:
                self._note_versions(parameters, names)
            kept = [name for name in parameters if name not in names]
            path = self._path(self.placement)
            before, self._filled, self._is_queued, self._updated = self._filled, self.placement, False, set()
            if kept and before is not None:
                # First, for what arrives may come straight into slots.
                self._move(before, kept)
                if self._arrives_E.any():
                    self._distribute(kept, self._path_of_arrivals(path, before))
            if names:
                self._distribute(names, path)
        if not self._distributions:
            # Nothing to finish before the next forward, but maybe moves.
            self._stream.join()
        return not kept

    def _names_to_send(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """The parameters whose slots have other values than the next distribution brings. The same on all ranks."""
        return [name for name in parameters if self._updated is None or name in self._updated]

    def _move(self, before: Placement, kept: Collection[str]) -> None:
        """Move the experts that stay on this rank to their new indices."""
        moves = plan_moves(before, self.placement, self._group.expert.rank)
        for name in kept:
            slot = self.weights[name].detach()
            for old, new in moves:
                slot[new].copy_(slot[old])

    def _distribute(self, names: Collection[str], path: WeightPath) -> None:
        parameters = self._parameters()
        # From CPU memory each layer's rows travel by themselves.
        shards = {
            name: local_shard(parameters[name]).to(self.device, self.weights[name].dtype, non_blocking=True)
            for name in names
        }
        slots = {name: self.weights[name].detach() for name in names}
        self._distributions.append(PendingDistribution(shards, slots, path))

    def _path_of_arrivals(self, path: WeightPath, before: Placement) -> WeightPath:
        """The path of weights to the ranks that did not have them `before`."""
        arrives_P = before.arrivals(self.placement)
        arrives: tuple[np.ndarray, ...] = (arrives_P,)
        if self._group.nodes is not None:
            arrives = node_arrivals(arrives_P, self.placement, self._group.expert.rank, self._group.ranks_per_node)
        stages = [replace(stage, arrives_P=pairs) for stage, pairs in zip(path.stages, arrives, strict=True)]
        return replace(path, stages=stages, arrives_E=self._arrives_E)

    def _note_versions(self, parameters: Mapping[str, Tensor], names: Collection[str]) -> None:
        versions = _versions(parameters)
        self._sent_versions.update({name: versions[name] for name in names})

    def _path(self, placement: Placement) -> WeightPath:
        if self._stages is None or self._stages[0] is not placement:
            placements: tuple[Placement, ...] = (placement,)
            if self._group.nodes is not None:
                placements = node_placements(placement, self._group.expert.rank, self._group.ranks_per_node)
            self._stages = placement, list(map(Stage, self._group.weights, placements))
        return WeightPath(self._stages[1], self._group.replicate, self._stream, self.bytes_sent)

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

    def holds(self, placement: Placement) -> bool:
        """Whether the slots still have the weights of the last forward under `placement`."""
        is_under_way = self._is_queued or bool(self._distributions)
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
            is_double = next(iter(gradients.values())).dtype == torch.float64
            wire_dtype = torch.float64 if is_double else self._wire_dtype
            return PendingCollection(gradients, self._path(self._filled), wire_dtype)

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
            self.weights[name].requires_grad_(sharded.requires_grad)
        return are_new


def _versions(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: write_counts(parameter) for name, parameter in parameters.items()}
