"""The expert layer's operations: a torch reference of each, and the fast paths beside it."""

from swiftmoe_lightning.kernels.grouped import ACTIVATIONS, Activation, activate, expert_mlp
from swiftmoe_lightning.kernels.reference import combine, permute

__all__ = ["ACTIVATIONS", "Activation", "activate", "combine", "expert_mlp", "permute"]
