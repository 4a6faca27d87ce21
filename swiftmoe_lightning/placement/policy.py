"""The rule for the next placements: what the engine asks of it. L layers, E experts, W ranks, s slots of a rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from swiftmoe_lightning.placement.placement import Placement


class PlacementPolicy(ABC):
    """A rule for the next placements: deterministic and pure, so that every rank finds the same answer alone.

    world_size, slots_per_rank: W and s, fixed for a run.
    """

    # Whether a plan is made from the counts of the very step that it serves, not from the steps before.
    needs_current_counts: ClassVar[bool] = False
    # Whether a new host needs the expert's whole optimizer state, as where it lives with the weights.
    moves_optimizer_state: ClassVar[bool] = False

    def __init__(self, world_size: int, slots_per_rank: int) -> None:
        self.world_size = world_size
        self.slots_per_rank = slots_per_rank

    @property
    def num_slots(self) -> int:
        return self.world_size * self.slots_per_rank

    @abstractmethod
    def next_placements(self, popularity_LE: np.ndarray) -> Sequence[Placement]:
        """One `Placement` a layer.

        popularity_LE: [L, E] token-choices expected of the next step, all ranks; zeros are allowed.
        """

    def placements_of(self, tables_LS: Sequence[np.ndarray] | np.ndarray, num_experts: int) -> list[Placement]:
        """The expert of every slot of every layer, as placements for these ranks."""
        return [Placement(table_S, num_experts, self.world_size) for table_S in tables_LS]


def check_placements(
    policy: PlacementPolicy, placements: Sequence[Placement], num_layers: int, num_experts: int
) -> None:
    """Raise ValueError unless a policy's placements fit its ranks, its slots and the layers."""
    name = type(policy).__name__
    if len(placements) != num_layers:
        raise ValueError(f"{name}.next_placements gave {len(placements)} placements for {num_layers} layers.")
    wanted = (num_experts, policy.world_size, policy.slots_per_rank)
    for placement in placements:
        found = (placement.num_experts, placement.world_size, placement.slots_per_rank)
        if found != wanted:
            raise ValueError(
                f"{name}.next_placements must place {wanted[0]} experts on {wanted[1]} ranks of {wanted[2]} slots, got "
                f"a placement of {found[0]} experts on {found[1]} ranks of {found[2]} slots."
            )
