"""Replays of placement policies on recorded traces, their costs, and reports. Numpy only, no processes."""

from swiftmoe_lightning.analysis.candidates import CANDIDATES, Candidate
from swiftmoe_lightning.analysis.cluster import Cluster, Workload
from swiftmoe_lightning.analysis.cost import Machine
from swiftmoe_lightning.analysis.megatron import read_megatron
from swiftmoe_lightning.analysis.model_sizes import PRESETS, ModelSizes, model_of
from swiftmoe_lightning.analysis.plan import Plan, PlanOptions, make_plan
from swiftmoe_lightning.analysis.read_trace import read_trace
from swiftmoe_lightning.analysis.recommend import Recommendation, recommend
from swiftmoe_lightning.analysis.replay import Replay, Rules, replay
from swiftmoe_lightning.analysis.scale import GroupCost
from swiftmoe_lightning.analysis.scale_advice import Advice
from swiftmoe_lightning.analysis.scenarios import SCENARIOS, Scenario, ScenarioOptions, make_scenario, scenario_shares
from swiftmoe_lightning.analysis.sizes import Sizes
from swiftmoe_lightning.analysis.sweep import Point, Sweep
from swiftmoe_lightning.analysis.trace import Trace
from swiftmoe_lightning.analysis.write_trace import check_writable, writer_for

__all__ = [
    "CANDIDATES",
    "PRESETS",
    "SCENARIOS",
    "Advice",
    "Candidate",
    "Cluster",
    "GroupCost",
    "Machine",
    "ModelSizes",
    "Plan",
    "PlanOptions",
    "Point",
    "Recommendation",
    "Replay",
    "Rules",
    "Scenario",
    "ScenarioOptions",
    "Sizes",
    "Sweep",
    "Trace",
    "Workload",
    "check_writable",
    "make_plan",
    "make_scenario",
    "model_of",
    "read_megatron",
    "read_trace",
    "recommend",
    "replay",
    "scenario_shares",
    "writer_for",
]
