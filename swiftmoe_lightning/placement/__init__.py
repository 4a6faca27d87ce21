"""Pure maths of where experts live and which tokens go where. No torch, no processes."""

from swiftmoe_lightning.placement.balanced import BalancedPolicy
from swiftmoe_lightning.placement.certificate import (
    CAUSES,
    Certificate,
    certify,
    certify_drops,
    certify_imbalance,
)
from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.load import ExpertLoad, imbalance
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.placer import LayerMemory, Placer
from swiftmoe_lightning.placement.policies import (
    PackedPolicy,
    StaticPolicy,
    SymiPolicy,
    make_policy,
)
from swiftmoe_lightning.placement.policy import PlacementPolicy
from swiftmoe_lightning.placement.token_split import Capacity, DispatchPlan, RankPlan, plan_dispatch
from swiftmoe_lightning.placement.transfer import (
    TransferPlan,
    peer_runs,
    plan_collection,
    plan_distribution,
    shard_rows,
)

__all__ = [
    "CAUSES",
    "BalancedPolicy",
    "Capacity",
    "Certificate",
    "DispatchPlan",
    "ExpertLoad",
    "Forecast",
    "LayerMemory",
    "PackedPolicy",
    "Placement",
    "PlacementPolicy",
    "Placer",
    "RankPlan",
    "StaticPolicy",
    "SymiPolicy",
    "TransferPlan",
    "certify",
    "certify_drops",
    "certify_imbalance",
    "imbalance",
    "make_policy",
    "peer_runs",
    "plan_collection",
    "plan_dispatch",
    "plan_distribution",
    "shard_rows",
]
