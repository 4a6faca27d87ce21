"""Phase 4 of a step where memory is scarce: a layer's slots hold weights only around its forward and its backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from swiftmoe_lightning.distributed import to_device, to_host
from swiftmoe_lightning.engine.weight_window import NUM_AHEAD, WeightWindow
from swiftmoe_lightning.modules import in_backward

if TYPE_CHECKING:
    from swiftmoe_lightning.engine.sharded_layer import ShardedLayer

# What a rank announces that has no more batches, instead of a layer's index.
_DONE: Final = -1


class StreamedWindow(WeightWindow):
    """Slots as in ZeRO-3 (arXiv 1910.02054) and FSDP2's `reshard_after_forward`: filled for use, then freed.

    A forward fills its layer's slots and the next two layers', and frees its own at the end. Backward does the same the
    other way round, among the layers that a forward has reached. The module's last layer keeps its slots from a forward
    to its backward, which comes first. So three layers' slots have memory at a time; layers that an activation
    checkpoint recomputes together keep theirs until each has its gradients.

    What is filled, and when, follows from the layers that forwards and backwards reach, which are the same on all ranks
    (the handshake checks it in forward, and autograd runs equal graphs in one order); freeing is each rank's own.
    Evaluation forwards may be of some expert groups alone: in them a fill, which all groups take part in, is announced,
    and groups that have no more batches follow.
    """

    def __init__(self) -> None:
        super().__init__()
        # Layers that forwards have reached, and backward has not.
        self._reached: set[ShardedLayer] = set()
        self._kept: set[ShardedLayer] = set()
        # Forwards of a layer in which backward is.
        self._entered: Counter[ShardedLayer] = Counter()

    def add(self, layers: Iterable[ShardedLayer]) -> None:
        """Free these layers' slots, whose weights are old, and let the first layers' be sent."""
        for layer in layers:
            layer.slots.free()
        self._forget()
        self._fill_ahead(self.layers)

    def advance(self, layer: ShardedLayer) -> None:
        """`layer` is about to run: wait for its weights, and let those of the next ones be sent."""
        if in_backward():
            # An activation checkpoint runs the forward again.
            self._fill(layer)
            self._fill_ahead(self._below(layer))
            return
        following = self.layers[layer.index + 1 :]
        self._entered.clear()
        # Also what a backward that has failed, or a forward that left layers out, has filled in vain.
        self._free_all_but({layer, *following[:NUM_AHEAD], *self._kept})
        if torch.is_grad_enabled() or layer.experts.training:
            # Reentrant checkpointing trains by forwards without gradients.
            self._reached.add(layer)
        announces = self.replicas is not None and not torch.is_grad_enabled()
        self._fill(layer, announces)
        self._fill_ahead(following, announces)

    def end_forward(self, layer: ShardedLayer, trains: bool) -> None:
        """Free the slots of `layer`, unless its backward comes next."""
        if in_backward():
            return
        if trains and layer is self.layers[-1]:
            self._kept.add(layer)
        elif layer not in self._kept:
            layer.slots.free()

    def reach_backward(self, layer: ShardedLayer) -> None:
        """Backward is about to compute with the weights of `layer`: wait for them, and let the next ones be sent."""
        self._entered[layer] += 1
        self._fill(layer)
        self._fill_ahead(self._below(layer))

    def leave_backward(self, layer: ShardedLayer, of_all_forwards: bool) -> None:
        """Backward has computed with the weights of `layer`; of_all_forwards: of each that it has reached."""
        self._entered[layer] = 0 if of_all_forwards else max(self._entered[layer] - 1, 0)
        if not self._entered[layer]:
            self._reached.discard(layer)
            self._kept.discard(layer)
            layer.slots.free()

    def refill(self, layer: ShardedLayer) -> None:
        """Let the weights of `layer`, which has stale slots on some rank, be sent anew when it runs."""
        layer.slots.queue_refill()
        layer.slots.free()

    def flush(self) -> None:
        """Nothing waits to be sent once."""

    def finish(self) -> None:
        """Wait for the weights that are under way."""
        for layer in self.layers:
            layer.slots.finish_distribution()

    def follow_other_groups(self) -> None:
        """Take part in the fills of groups that still run forwards. Afterwards no slots are filled."""
        while self.replicas is not None and (index := self._announce(_DONE)) != _DONE:
            layer = self.layers[index]
            layer.slots.free()
            layer.start_distribution()
            layer.slots.free()
        self._forget()
        self._free_all_but(())

    def _forget(self) -> None:
        self._reached.clear()
        self._kept.clear()
        self._entered.clear()

    def _below(self, layer: ShardedLayer) -> list[ShardedLayer]:
        """The layers that backward will reach after `layer`."""
        return [below for below in reversed(self.layers[: layer.index]) if below in self._reached]

    def _free_all_but(self, kept: Collection[ShardedLayer]) -> None:
        for layer in self.layers:
            if layer.slots.has_memory and layer not in kept:
                layer.slots.free()

    def _fill(self, layer: ShardedLayer, announces: bool = False) -> None:
        self._start(layer, announces)
        layer.slots.finish_distribution()

    def _fill_ahead(self, following: Sequence[ShardedLayer], announces: bool = False) -> None:
        for layer in following[:1]:
            # Its first leg had the layer before to travel.
            layer.slots.continue_distribution()
        for layer in following[:NUM_AHEAD]:
            self._start(layer, announces)

    def _start(self, layer: ShardedLayer, announces: bool) -> None:
        if layer.slots.is_current:
            return
        if announces and (other := self._announce(layer.index)) != layer.index:
            raise RuntimeError(
                f"expert groups evaluate different layers: {self._name(layer.index)}, and in another group "
                f"{self._name(other)}. With reshard_after_forward=True all groups send a layer's weights together, so "
                "every evaluation forward must run the same layers in the same order, and engine.join() must end the "
                "loop. (FAQ: different-forwards)"
            )
        layer.slots.free()
        layer.start_distribution()

    def _announce(self, index: int) -> int:
        """Tell the other groups which layer this one is about to fill; `_DONE` for none.

        Returns:
            The layer that another group is about to fill; `index` where no other is.
        """
        assert self.replicas is not None
        (row,) = to_device(self.layers[0].slots.device, np.array([index], np.int32))
        others = set(to_host(self.replicas.all_gather(row)).flatten().tolist()) - {_DONE, index}
        return min(others, default=index)

    def _name(self, index: int) -> str:
        return f"layer {index} of {len(self.layers)}"
