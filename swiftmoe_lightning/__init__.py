"""Adaptive expert replication for training Mixture-of-Experts models in PyTorch Lightning and plain PyTorch.

Importing it registers `strategy="swiftmoe"` with Lightning's Trainer and Fabric, and
`experts_implementation="swiftmoe"` with transformers where that is imported already.
"""

import sys
from contextlib import suppress

from swiftmoe_lightning.callbacks import ExpertPopularityMonitor, PlacementRecorder
from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.engine import SwiftMoEEngine
from swiftmoe_lightning.modules import (
    Experts,
    LayerLoad,
    LoadReader,
    MoE,
    RouterOutput,
    TopKRouter,
    auxiliary_loss,
    convert,
    register_hf_experts,
)
from swiftmoe_lightning.placement import Placement, PlacementPolicy
from swiftmoe_lightning.strategies import SwiftMoEFabricStrategy, SwiftMoEStrategy, accelerate, register

__all__ = [
    "ExpertPopularityMonitor",
    "Experts",
    "LayerLoad",
    "LoadReader",
    "MoE",
    "Placement",
    "PlacementPolicy",
    "PlacementRecorder",
    "RouterOutput",
    "SwiftMoEConfig",
    "SwiftMoEEngine",
    "SwiftMoEFabricStrategy",
    "SwiftMoEStrategy",
    "TopKRouter",
    "accelerate",
    "auxiliary_loss",
    "convert",
    "register_hf_experts",
]

register()
if "transformers" in sys.modules:
    # One before version 5 has no such implementations.
    with suppress(ImportError):
        register_hf_experts()
