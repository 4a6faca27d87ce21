"""The placement policies by name."""

from __future__ import annotations

from typing import Final

from swiftmoe_lightning.config import PLACEMENTS, check_choice
from swiftmoe_lightning.placement.policies.balanced import BalancedPolicy
from swiftmoe_lightning.placement.policies.packed import PackedPolicy
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy
from swiftmoe_lightning.placement.policies.static import StaticPolicy
from swiftmoe_lightning.placement.policies.swap import SwapPolicy
from swiftmoe_lightning.placement.policies.symi import SymiPolicy

_OF_NODES: Final[dict[str, type[BalancedPolicy] | type[SwapPolicy]]] = {
    "balanced": BalancedPolicy,
    "swap": SwapPolicy,
}
_POLICIES: Final[dict[str, type[PlacementPolicy]]] = {
    "static": StaticPolicy,
    "symi": SymiPolicy,
    "packed": PackedPolicy,
}


def make_policy(
    placement: str | type[PlacementPolicy], world_size: int, slots_per_rank: int, ranks_per_node: int = 1
) -> PlacementPolicy:
    """The policy of that name, or of that class.

    Args:
        placement: one of `PLACEMENTS`, or a policy class.
        world_size: W.
        slots_per_rank: s.
        ranks_per_node: neighbours on a node.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything that is neither a name nor a policy class.
    """
    if isinstance(placement, str):
        check_choice("placement", placement, PLACEMENTS)
        if placement in _OF_NODES:
            return _OF_NODES[placement](world_size, slots_per_rank, ranks_per_node)
        placement = _POLICIES[placement]
    if not (isinstance(placement, type) and issubclass(placement, PlacementPolicy)):
        raise TypeError(f"placement must be a name or a subclass of PlacementPolicy, got {placement!r}.")
    return placement(world_size, slots_per_rank)
