"""What placement policies would have done with a recorded trace. Numpy only, no processes."""

from swiftmoe_lightning.planner.trace import Trace

__all__ = ["Trace"]
