"""The GPU benchmark's tests need Triton."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _has_triton() -> None:
    pytest.importorskip("triton")
