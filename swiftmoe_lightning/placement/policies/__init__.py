"""The placement policies, one a file. `policy.py` has their interface, `registry.py` their names."""

from swiftmoe_lightning.placement.policies.balanced import BalancedPolicy
from swiftmoe_lightning.placement.policies.packed import PackedPolicy
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy, check_placements
from swiftmoe_lightning.placement.policies.registry import make_policy
from swiftmoe_lightning.placement.policies.static import StaticPolicy
from swiftmoe_lightning.placement.policies.swap import SwapPolicy
from swiftmoe_lightning.placement.policies.symi import SymiPolicy

__all__ = [
    "BalancedPolicy",
    "PackedPolicy",
    "PlacementPolicy",
    "StaticPolicy",
    "SwapPolicy",
    "SymiPolicy",
    "check_placements",
    "make_policy",
]
