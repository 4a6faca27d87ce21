"""Placement policies of other systems, to compare with: all re-implementations, from papers and public code.

They are for planning on recorded counts. Those that remember (`RevisingPolicy`) are deterministic, but not pure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from swiftmoe_lightning.placement import PlacementPolicy
from swiftmoe_lightning.planner.baselines.eplb import EPLBPolicy
from swiftmoe_lightning.planner.baselines.flexmoe import FlexMoEPolicy
from swiftmoe_lightning.planner.baselines.lpt import LPTPolicy
from swiftmoe_lightning.planner.baselines.revising import RevisingPolicy
from swiftmoe_lightning.planner.baselines.shadowing import ShadowingPolicy

# Name -> a fresh policy for W ranks of s slots.
BASELINES: Final[Mapping[str, Callable[[int, int], PlacementPolicy]]] = {
    "flexmoe-10": partial(FlexMoEPolicy, interval=10),
    "flexmoe-50": partial(FlexMoEPolicy, interval=50),
    "flexmoe-100": partial(FlexMoEPolicy, interval=100),
    "eplb": EPLBPolicy,
    "lpt": LPTPolicy,
    "shadowing": ShadowingPolicy,
}

__all__ = [
    "BASELINES",
    "EPLBPolicy",
    "FlexMoEPolicy",
    "LPTPolicy",
    "RevisingPolicy",
    "ShadowingPolicy",
]
