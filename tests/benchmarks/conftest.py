"""Benchmarks run in a test write into its own folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import provenance


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Any]]:
    """Reads a result by its name. Whatever a benchmark writes, its temporary files too, goes to `tmp_path`."""
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    return lambda name: json.loads((tmp_path / f"{name}.json").read_text())
