"""Names the phases of a training step for profilers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function


def phase(name: str) -> AbstractContextManager[Any]:
    """Inside, work is charged to the range "swiftmoe::name" by torch's profiler, and by all that build on it.

    torch.compile has no ranges in its graphs.

    Args:
        name: of the phase, as docs/training-step.md lists them.
    """
    return nullcontext() if torch.compiler.is_compiling() else record_function(f"swiftmoe::{name}")
