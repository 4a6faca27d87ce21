"""Reads the load that the MoE layers of a module have trained on. E experts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from swiftmoe_lightning.modules.experts import Experts
from swiftmoe_lightning.placement import Bounds, Capacity, ExpertLoad, find_bounds


@dataclass(frozen=True, eq=False)
class LayerLoad(ExpertLoad):
    """The load that one MoE layer trained on between two reads; equal on all ranks.

    Attributes:
        num_moved: (rank, expert) pairs of its placement that the placement at the read before did not have.
        capacity: the layer's; None is dropless.
    """

    num_moved: int
    capacity: Capacity | None

    @property
    def replica_counts_E(self) -> np.ndarray:
        """[E] int64: slots of each expert in the last step."""
        return self.placement.replica_counts_E

    @property
    def bounds(self) -> Bounds:
        """Lower bounds of what was lost, and how much each cause added: drops with a capacity, imbalance without.

        For reads of one step. Over several steps it compares with a single placement for all of them.
        """
        return find_bounds(self, self.capacity)


class LoadReader:
    """Reads the counters of all `Experts` layers of a module; readers do not disturb each other.

    Validation is not counted, and activation checkpointing counts once.

    Args:
        module: its layers are looked up once, here.
    """

    def __init__(self, module: nn.Module) -> None:
        self._layers = {name: child for name, child in module.named_modules() if isinstance(child, Experts)}
        self._cursors = {name: experts.load_cursor() for name, experts in self._layers.items()}
        self._placements = {name: experts.trained_load.total.placement for name, experts in self._layers.items()}

    @property
    def token_bytes(self) -> dict[str, int]:
        """Bytes of tokens that this rank has sent since the start: "inside" its node, and "between" nodes.

        Those of all layers, validation and recomputed forwards included.
        """
        # Layers share the groups in which they send, and so the counters.
        for experts in self._layers.values():
            return dict(experts.context.token_bytes)
        return {"inside": 0, "between": 0}

    @property
    def num_experts(self) -> dict[str, int]:
        """Layer name -> E, in the module's order."""
        return {name: experts.num_experts for name, experts in self._layers.items()}

    def read(self) -> dict[str, LayerLoad]:
        """Layer name -> its load since the last read, or since the reader was made; layers without any are left out."""
        loads = {}
        for name, experts in self._layers.items():
            load, previous = self._cursors[name].read(), self._placements[name]
            current = self._placements[name] = load.placement
            if load.num_assignments:
                num_moved = previous.num_moved(current) if previous.world_size == current.world_size else 0
                parts = (load.counts_WE, load.wanted_W, load.load_W, load.budget)
                loads[name] = LayerLoad(current, *parts, num_moved, experts.capacity)
        return loads
