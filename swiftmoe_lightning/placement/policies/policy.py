"""The interface of placement policies, and the check of what they return.

L layers, E experts, W ranks, s slots of a rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement


class PlacementPolicy(ABC):
    """A rule for the next placements: deterministic and pure, so that every rank computes the same one by itself.

    Args:
        world_size: W, fixed for a run.
        slots_per_rank: s, fixed for a run.
    """

    # Whether uniform replicas may take over where they would have done better (see `Placer`).
    has_uniform_fallback: ClassVar[bool] = False

    def __init__(self, world_size: int, slots_per_rank: int) -> None:
        self.world_size = world_size
        self.slots_per_rank = slots_per_rank

    @property
    def num_slots(self) -> int:
        """S = W * s."""
        return self.world_size * self.slots_per_rank

    @abstractmethod
    def place(self, forecast: Forecast) -> Sequence[Placement]:
        """One `Placement` a layer.

        Args:
            forecast: of the next step: `popularity_LE` [L, E] assignments of all ranks (zeros are allowed), and its
                spread.
        """

    def placements_of(self, tables_LS: Sequence[np.ndarray] | np.ndarray, num_experts: int) -> list[Placement]:
        """The expert of every slot of every layer, as placements for these ranks.

        Args:
            tables_LS: [L, S], the expert in each slot.
            num_experts: E.

        Raises:
            ValueError: when a table is no `Placement` on these ranks.
        """
        return [Placement(table_S, num_experts, self.world_size) for table_S in tables_LS]


def check_placements(
    policy: PlacementPolicy, placements: Sequence[Placement], num_layers: int, num_experts: int
) -> None:
    """Make sure that a policy's placements fit its ranks, its slots and the layers.

    Args:
        policy: that made them.
        placements: what its `place` returned.
        num_layers: L.
        num_experts: E.

    Raises:
        ValueError: unless they fit.
    """
    name = type(policy).__name__
    if len(placements) != num_layers:
        raise ValueError(f"{name}.place gave {len(placements)} placements for {num_layers} layers.")
    needed = (num_experts, policy.world_size, policy.slots_per_rank)
    for placement in placements:
        sizes = (placement.num_experts, placement.world_size, placement.slots_per_rank)
        if sizes != needed:
            raise ValueError(
                f"{name}.place must place {needed[0]} experts on {needed[1]} ranks of {needed[2]} slots, got "
                f"a placement of {sizes[0]} experts on {sizes[1]} ranks of {sizes[2]} slots."
            )
