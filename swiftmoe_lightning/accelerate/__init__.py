"""Hugging Face Accelerate: the engine in a plain Accelerate loop."""

from swiftmoe_lightning.accelerate.parallel_axes import check_processes, make_engine
from swiftmoe_lightning.accelerate.preparation import (
    STATE_FILE,
    check_fresh,
    data_parallel,
    gather_state_dicts,
    prepare,
    share_scaler,
)

__all__ = [
    "STATE_FILE",
    "check_fresh",
    "check_processes",
    "data_parallel",
    "gather_state_dicts",
    "make_engine",
    "prepare",
    "share_scaler",
]
