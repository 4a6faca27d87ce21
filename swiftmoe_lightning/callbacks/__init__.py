"""Lightning callbacks that record and log a run, and do not change it."""

from swiftmoe_lightning.callbacks.placement_recorder import PlacementRecorder
from swiftmoe_lightning.callbacks.popularity_monitor import ExpertPopularityMonitor

__all__ = ["ExpertPopularityMonitor", "PlacementRecorder"]
