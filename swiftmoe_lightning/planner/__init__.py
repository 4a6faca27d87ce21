"""What placement policies would have done with a recorded trace. Numpy only, no processes."""

from swiftmoe_lightning.planner.read_trace import read_trace
from swiftmoe_lightning.planner.trace import Trace
from swiftmoe_lightning.planner.write_trace import write_npz, write_parquet, writer_for

__all__ = ["Trace", "read_trace", "write_npz", "write_parquet", "writer_for"]
