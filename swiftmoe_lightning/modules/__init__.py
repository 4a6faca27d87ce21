"""nn.Modules: router, experts, MoE block. Without an engine they run on one device, under one over all ranks."""

from swiftmoe_lightning.modules.clustered_router import ClusteredRouter
from swiftmoe_lightning.modules.context import NON_FINITE_SCORES, ExpertParallelContext, SingleDeviceContext
from swiftmoe_lightning.modules.expert_choice import ExpertChoiceRouter
from swiftmoe_lightning.modules.experts import Experts
from swiftmoe_lightning.modules.forward import ExpertsOutput
from swiftmoe_lightning.modules.group_limited import GroupLimitedRouter
from swiftmoe_lightning.modules.hash_router import HashRouter
from swiftmoe_lightning.modules.hidden_cuts import HiddenCut, hidden_cuts
from swiftmoe_lightning.modules.load import LoadCursor, TrainedLoad, in_backward
from swiftmoe_lightning.modules.moe import MoE, auxiliary_loss
from swiftmoe_lightning.modules.noisy_routers import JitterRouter, NoisyTopKRouter
from swiftmoe_lightning.modules.reader import LayerLoad, LoadReader
from swiftmoe_lightning.modules.router import RouterOutput, TopKRouter
from swiftmoe_lightning.modules.routing_replay import (
    record_routing,
    replay_routing,
    routing_from_array,
    routing_to_array,
)
from swiftmoe_lightning.modules.sequence_clusters import SequenceClusters
from swiftmoe_lightning.modules.sharded_forward import (
    AnnouncedTokens,
    ShardedEvaluation,
    evaluates_sharded,
    finish_sharded,
)
from swiftmoe_lightning.modules.sinkhorn_router import SinkhornRouter
from swiftmoe_lightning.modules.weights import shape_message

__all__ = [
    "NON_FINITE_SCORES",
    "AnnouncedTokens",
    "ClusteredRouter",
    "ExpertChoiceRouter",
    "ExpertParallelContext",
    "Experts",
    "ExpertsOutput",
    "GroupLimitedRouter",
    "HashRouter",
    "HiddenCut",
    "JitterRouter",
    "LayerLoad",
    "LoadCursor",
    "LoadReader",
    "MoE",
    "NoisyTopKRouter",
    "RouterOutput",
    "SequenceClusters",
    "ShardedEvaluation",
    "SingleDeviceContext",
    "SinkhornRouter",
    "TopKRouter",
    "TrainedLoad",
    "auxiliary_loss",
    "evaluates_sharded",
    "finish_sharded",
    "hidden_cuts",
    "in_backward",
    "record_routing",
    "replay_routing",
    "routing_from_array",
    "routing_to_array",
    "shape_message",
]
