"""Adaptive expert replication for training Mixture-of-Experts models in PyTorch Lightning and plain PyTorch.

Importing it registers `strategy="swiftmoe"` with Lightning's Trainer and Fabric, and
`experts_implementation="swiftmoe"` with transformers where that is imported already.
"""

import sys
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from swiftmoe_lightning import accelerate
from swiftmoe_lightning.callbacks import ExpertPopularityMonitor, PlacementRecorder
from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.engine import MemoryCheckpoint, Muon, SwiftMoEEngine, muon_groups
from swiftmoe_lightning.huggingface import convert, register_hf_experts
from swiftmoe_lightning.modules import (
    ClusteredRouter,
    ExpertChoiceRouter,
    Experts,
    GroupLimitedRouter,
    HashRouter,
    JitterRouter,
    LayerLoad,
    LoadReader,
    MoE,
    NoisyTopKRouter,
    RouterOutput,
    SequenceClusters,
    SinkhornRouter,
    TopKRouter,
    auxiliary_loss,
    record_routing,
    replay_routing,
    routing_from_array,
    routing_to_array,
)
from swiftmoe_lightning.placement import Forecast, Placement, PlacementPolicy
from swiftmoe_lightning.strategies import SwiftMoEFabricStrategy, SwiftMoEStrategy, register

if TYPE_CHECKING:
    from swiftmoe_lightning.huggingface.trainer import SwiftMoETrainer

__all__ = [
    "ClusteredRouter",
    "ExpertChoiceRouter",
    "ExpertPopularityMonitor",
    "Experts",
    "Forecast",
    "GroupLimitedRouter",
    "HashRouter",
    "JitterRouter",
    "LayerLoad",
    "LoadReader",
    "MemoryCheckpoint",
    "MoE",
    "Muon",
    "NoisyTopKRouter",
    "Placement",
    "PlacementPolicy",
    "PlacementRecorder",
    "RouterOutput",
    "SequenceClusters",
    "SinkhornRouter",
    "SwiftMoEConfig",
    "SwiftMoEEngine",
    "SwiftMoEFabricStrategy",
    "SwiftMoEStrategy",
    "SwiftMoETrainer",
    "TopKRouter",
    "accelerate",
    "auxiliary_loss",
    "convert",
    "muon_groups",
    "record_routing",
    "register_hf_experts",
    "replay_routing",
    "routing_from_array",
    "routing_to_array",
]
if find_spec("transformers") is None:
    __all__.remove("SwiftMoETrainer")


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("swiftmoe-lightning")
    # Imported on first use, since its base class is in transformers, which is optional and slow to import.
    if name != "SwiftMoETrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from swiftmoe_lightning.huggingface.trainer import SwiftMoETrainer
    except ModuleNotFoundError as error:
        raise ImportError(
            f"SwiftMoETrainer needs transformers ({error}). Install it: pip install 'transformers>=5.13,<6'"
        ) from error
    return SwiftMoETrainer


register()
if "transformers" in sys.modules:
    # transformers before version 5 has no such implementations.
    with suppress(ImportError):
        register_hf_experts()
