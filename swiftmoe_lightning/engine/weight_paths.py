"""The ways of weights and gradients between the rows that this rank owns and its slots, for each placement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from swiftmoe_lightning.distributed import ExpertGroup, SideStream
from swiftmoe_lightning.engine.weight_exchange import PHASES, Stage, WeightPath
from swiftmoe_lightning.placement import Placement, node_arrivals, node_placements


class WeightPaths:
    """Makes the `WeightPath`s of one layer.

    Args:
        group: this rank's expert group, and those that share its rows.
        stream: on which rows are packed, added up and copied.

    Attributes:
        bytes_sent: phase -> bytes that this rank has sent to other ranks so far.
    """

    def __init__(self, group: ExpertGroup, stream: SideStream) -> None:
        self._group, self._stream = group, stream
        self._stages: tuple[Placement, list[Stage]] | None = None
        self.bytes_sent = dict.fromkeys(PHASES, 0)

    def to(self, placement: Placement) -> WeightPath:
        """Between all rows and the slots by `placement`."""
        if self._stages is None or self._stages[0] is not placement:
            placements: tuple[Placement, ...] = (placement,)
            if self._group.nodes is not None:
                placements = node_placements(placement, self._group.expert.rank, self._group.ranks_per_node)
            self._stages = placement, list(map(Stage, self._group.weights, placements))
        return WeightPath(self._stages[1], self._group.replicate, self._stream, self.bytes_sent)

    def of_arrivals(self, before: Placement, placement: Placement, arrives_E: np.ndarray) -> WeightPath:
        """To the slots of experts by `placement` on ranks that did not have them `before`.

        Args:
            before: the placement of the slots as they are.
            placement: as they will be.
            arrives_E: [E] bool, the experts that arrive in any group.
        """
        arrives_P = before.arrivals(placement)
        arrives: tuple[np.ndarray, ...] = (arrives_P,)
        if self._group.nodes is not None:
            arrives = node_arrivals(arrives_P, placement, self._group.expert.rank, self._group.ranks_per_node)
        path = self.to(placement)
        stages = [replace(stage, arrives_P=pairs) for stage, pairs in zip(path.stages, arrives, strict=True)]
        return replace(path, stages=stages, arrives_E=arrives_E)
