"""The expert layer's operations: a torch reference of each, and the fast paths beside it."""

from swiftmoe_lightning.ops.grouped import expert_mlp
from swiftmoe_lightning.ops.moe_layer import expert_layer, expert_rows
from swiftmoe_lightning.ops.operators import SortedChoices, activate, combine, on_triton, permute, sort_choices
from swiftmoe_lightning.ops.reference import ACTIVATIONS, Activation
from swiftmoe_lightning.ops.routing import Routed, route

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "Routed",
    "SortedChoices",
    "activate",
    "combine",
    "expert_layer",
    "expert_mlp",
    "expert_rows",
    "on_triton",
    "permute",
    "route",
    "sort_choices",
]
