"""Phase 4 of a step: decides when the weights of each layer are sent to their slots, which all layers have."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from swiftmoe_lightning.engine.weight_window import NUM_AHEAD, WeightWindow

if TYPE_CHECKING:
    from swiftmoe_lightning.engine.sharded_layer import ShardedLayer


class DistributionWindow(WeightWindow):
    """The layers whose weights wait to be sent, in the order in which they will be: that of the module.

    After an optimizer step the first ones are sent. Each forward of a layer then waits for its own weights, and lets
    the next ones be sent, so that they travel while layers before them compute. The order is the same on all ranks and
    in all groups, whichever layers a forward reaches; only how early they begin is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._queue: dict[ShardedLayer, None] = {}
        self._under_way: dict[ShardedLayer, None] = {}

    def add(self, layers: Iterable[ShardedLayer]) -> None:
        """Let these layers' weights be sent, by the placements that their slots have been queued for."""
        self._queue.update(dict.fromkeys(layers))
        self._start(NUM_AHEAD - len(self._under_way))

    def advance(self, layer: ShardedLayer) -> None:
        """`layer` is about to run: wait for its weights, and let the next ones be sent."""
        if layer in self._queue:
            self._start(1 + list(self._queue).index(layer))
        layer.slots.finish_distribution()
        self._under_way.pop(layer, None)
        for following in list(self._under_way)[:1]:
            # Its first leg had the layer before to travel.
            following.slots.continue_distribution()
        self._start(NUM_AHEAD - len(self._under_way))

    def end_forward(self, layer: ShardedLayer, trains: bool) -> None:
        """Slots keep their weights for backward."""

    def reach_backward(self, layer: ShardedLayer) -> None:
        """The weights are there."""

    def leave_backward(self, layer: ShardedLayer, of_all_forwards: bool) -> None:
        """Slots keep their weights for another backward, or forward."""

    def refill(self, layer: ShardedLayer) -> None:
        """Start to send the weights of `layer`, which has stale slots on some rank, after all that wait."""
        layer.slots.queue_refill()
        self._queue.setdefault(layer)
        self.flush()

    def flush(self) -> None:
        """Start to send all weights that wait."""
        self._start(len(self._queue))

    def finish(self) -> None:
        """Send all weights that wait, and wait for all that are under way."""
        self.flush()
        for layer in self._under_way:
            layer.slots.finish_distribution()
        self._under_way.clear()

    def follow_other_groups(self) -> None:
        """Other groups' first forward has filled stale slots; this group may have had none."""
        for layer in self.layers if self.replicas is not None else ():
            if layer.stale:
                self.refill(layer)
                self.advance(layer)

    def _start(self, number: int) -> None:
        for layer in list(self._queue)[: max(number, 0)]:
            del self._queue[layer]
            self._under_way[layer] = None
            layer.start_distribution()
