"""Placement policies of other systems, to compare with: re-implementations from papers and public code.

They are for replays of recorded counts. Those that keep state between calls (`RevisingPolicy`) are deterministic.
"""

from __future__ import annotations

from swiftmoe_lightning.analysis.baselines.eplb import EPLBPolicy
from swiftmoe_lightning.analysis.baselines.flexmoe import FlexMoEPolicy
from swiftmoe_lightning.analysis.baselines.lpt import LPTPolicy
from swiftmoe_lightning.analysis.baselines.revising import RevisingPolicy
from swiftmoe_lightning.analysis.baselines.shadowing import ShadowingPolicy

__all__ = [
    "EPLBPolicy",
    "FlexMoEPolicy",
    "LPTPolicy",
    "RevisingPolicy",
    "ShadowingPolicy",
]
