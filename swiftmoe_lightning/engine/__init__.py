"""One training step over sharded parameters and slots; clipping, loss scaling and checkpoints for frameworks."""

from swiftmoe_lightning.engine.data_parallel import ExpertDataParallel, ignore_expert_parameters
from swiftmoe_lightning.engine.engine import SwiftMoEEngine
from swiftmoe_lightning.engine.gradients import ShardedGradScaler, clip_grad_norm, clip_grad_value
from swiftmoe_lightning.engine.memory_checkpoint import MemoryCheckpoint
from swiftmoe_lightning.engine.muon import Muon
from swiftmoe_lightning.engine.muon_groups import muon_groups

__all__ = [
    "ExpertDataParallel",
    "MemoryCheckpoint",
    "Muon",
    "ShardedGradScaler",
    "SwiftMoEEngine",
    "clip_grad_norm",
    "clip_grad_value",
    "ignore_expert_parameters",
    "muon_groups",
]
