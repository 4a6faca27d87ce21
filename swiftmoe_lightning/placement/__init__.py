"""Where experts live and which rank computes which tokens: pure maths in numpy, without torch or process groups."""

from swiftmoe_lightning.placement.bounds import CAUSES, Bounds, drop_bounds, find_bounds, imbalance_bounds
from swiftmoe_lightning.placement.checkpoint_copies import copy_ranks, plan_fetches
from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.hidden_cut import HiddenLayout, hidden_slices, piece_senders
from swiftmoe_lightning.placement.load import ExpertLoad, imbalance
from swiftmoe_lightning.placement.matrix_plan import LAYOUTS, MatrixBlock, MatrixStack, part_of_rows, plan_matrices
from swiftmoe_lightning.placement.messages import Messages, ShardBlock, SlotBlock, plan_messages
from swiftmoe_lightning.placement.moves import arriving_indices, node_arrivals, plan_moves
from swiftmoe_lightning.placement.node_placements import node_placements
from swiftmoe_lightning.placement.node_plan import LinkRows, NodePlan, RelayPlan
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.placer import LayerMemory, Placer
from swiftmoe_lightning.placement.policies import (
    BalancedPolicy,
    PackedPolicy,
    PlacementPolicy,
    StaticPolicy,
    SwapPolicy,
    SymiPolicy,
    make_policy,
)
from swiftmoe_lightning.placement.regrouping import Regrouping, regroup_received, regroup_sent
from swiftmoe_lightning.placement.token_split import Capacity, DispatchPlan, RankPlan, plan_dispatch
from swiftmoe_lightning.placement.transfer import (
    PeerBlock,
    TransferPlan,
    plan_buffer,
    plan_collection,
    plan_distribution,
    shard_rows,
)

__all__ = [
    "CAUSES",
    "LAYOUTS",
    "BalancedPolicy",
    "Bounds",
    "Capacity",
    "DispatchPlan",
    "ExpertLoad",
    "Forecast",
    "HiddenLayout",
    "LayerMemory",
    "LinkRows",
    "MatrixBlock",
    "MatrixStack",
    "Messages",
    "NodePlan",
    "PackedPolicy",
    "PeerBlock",
    "Placement",
    "PlacementPolicy",
    "Placer",
    "RankPlan",
    "Regrouping",
    "RelayPlan",
    "ShardBlock",
    "SlotBlock",
    "StaticPolicy",
    "SwapPolicy",
    "SymiPolicy",
    "TransferPlan",
    "arriving_indices",
    "copy_ranks",
    "drop_bounds",
    "find_bounds",
    "hidden_slices",
    "imbalance",
    "imbalance_bounds",
    "make_policy",
    "node_arrivals",
    "node_placements",
    "part_of_rows",
    "piece_senders",
    "plan_buffer",
    "plan_collection",
    "plan_dispatch",
    "plan_distribution",
    "plan_fetches",
    "plan_matrices",
    "plan_messages",
    "plan_moves",
    "regroup_received",
    "regroup_sent",
    "shard_rows",
]
