"""One MoE layer's evaluation with sharded experts: cuts its slots when the first such forward begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from swiftmoe_lightning.distributed import RankGroup
from swiftmoe_lightning.modules import AnnouncedTokens, ShardedEvaluation

if TYPE_CHECKING:
    from swiftmoe_lightning.engine.handshake_rows import HandshakeTable
    from swiftmoe_lightning.engine.sharded_layer import ShardedLayer


class LayerEvaluation(ShardedEvaluation):
    """A layer's evaluation with a piece of every expert on each rank, cut from the slots.

    Args:
        layer: the layer.
        ranks: of its group.
    """

    def __init__(self, layer: ShardedLayer, ranks: RankGroup) -> None:
        self._layer, self.ranks = layer, ranks

    def begin_forward(self, gather: Callable[[], HandshakeTable]) -> AnnouncedTokens:
        """Wait for all ranks' tokens, and cut the slots unless they are cut. A collective. See `ShardedEvaluation`."""
        table = self._layer.wait_for_call(gather)
        self._layer.slots.cut()
        popularity_E = table.counts_WE(self._layer.experts.num_experts).sum(0)
        return AnnouncedTokens(table.tokens_W, table.top_k, popularity_E)

    def weights(self) -> Mapping[str, Tensor]:
        """This rank's pieces, which need no gradients."""
        assert self._layer.slots.pieces is not None
        return self._layer.slots.pieces.weights
