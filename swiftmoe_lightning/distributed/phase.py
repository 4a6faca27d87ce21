"""Names the phases of a training step for profilers."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch.profiler import record_function


def phase(name: str) -> AbstractContextManager[Any]:
    """Inside, work is charged to the range "swiftmoe::name" by torch's profiler, and by all that build on it.

    Args:
        name: of the phase, as docs/training-step.md lists them.
    """
    return record_function(f"swiftmoe::{name}")
