"""Callbacks that watch a Trainer's run; they change nothing."""

from swiftmoe_lightning.callbacks.placement_recorder import PlacementRecorder
from swiftmoe_lightning.callbacks.popularity_monitor import ExpertPopularityMonitor

__all__ = ["ExpertPopularityMonitor", "PlacementRecorder"]
