"""The GPU benchmark's tests need Triton, and run as on a GPU, where kernels compute without numpy's warnings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    pytest.importorskip("triton")
    with np.errstate(all="ignore"):
        yield
