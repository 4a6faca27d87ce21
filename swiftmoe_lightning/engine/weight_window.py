"""When each layer's slots are filled: what the two ways, all layers at once or a few at a time, have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from swiftmoe_lightning.distributed import RankGroup
    from swiftmoe_lightning.engine.sharded_layer import ShardedLayer

# Layers whose weights are under way while one runs: enough for links to be busy, and for few buffers.
NUM_AHEAD: Final = 2


class WeightWindow(ABC):
    """Decides when layers' weights travel, in one order on all ranks: each fill is a collective.

    `DistributionWindow` fills every layer's slots once a step, `StreamedWindow` before each forward and backward.

    Attributes:
        layers: all of the engine's, in the order of the module.
        replicas: the ranks of other expert groups with the same rows; None for one group.
    """

    def __init__(self) -> None:
        self.layers: Sequence[ShardedLayer] = ()
        self.replicas: RankGroup | None = None

    def connect(self, layers: Sequence[ShardedLayer], replicas: RankGroup | None) -> None:
        """Take the engine's layers, again after they have changed."""
        self.layers, self.replicas = layers, replicas

    @abstractmethod
    def add(self, layers: Iterable[ShardedLayer]) -> None:
        """Let these layers' weights be sent, by the placements that their slots have been queued for."""

    @abstractmethod
    def advance(self, layer: ShardedLayer) -> None:
        """`layer` is about to run: wait for its weights, and let those of the next ones be sent."""

    @abstractmethod
    def end_forward(self, layer: ShardedLayer, trains: bool) -> None:
        """`layer` has run; trains: backward can reach it."""

    @abstractmethod
    def reach_backward(self, layer: ShardedLayer) -> None:
        """Backward is about to compute with the weights of `layer`."""

    @abstractmethod
    def leave_backward(self, layer: ShardedLayer, of_all_forwards: bool) -> None:
        """Backward has computed with the weights of `layer`; of_all_forwards: of each that it has reached."""

    @abstractmethod
    def refill(self, layer: ShardedLayer) -> None:
        """Send the weights of `layer` anew, which has stale slots on some rank."""

    @abstractmethod
    def flush(self) -> None:
        """Start to send all weights that wait to be sent once."""

    @abstractmethod
    def finish(self) -> None:
        """Send all weights that wait to be sent once, and wait for all that are under way."""

    @abstractmethod
    def follow_other_groups(self) -> None:
        """At the end of an evaluation loop: take part in what other groups' forwards have sent, or send."""
