"""The GPU benchmark's tests run as on a GPU: the interpreter's numpy warns of what a kernel computes silently."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield
