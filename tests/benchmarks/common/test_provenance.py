"""Every result says where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.common import provenance


def test_provenance_comes_before_the_results(result: Callable[[str], dict[str, Any]]) -> None:
    path = provenance.write_result("some", provenance.collect_provenance(), {"ratio": 1.0})
    written = result("some")
    assert path.name == "some.json"
    assert list(written) == ["certificate", "ratio"]
    keys = {"commit", "tree_is_clean", "date", "device", "cpu_cores", "load_average", "versions", "command"}
    assert written["certificate"].keys() == keys
    assert written["certificate"]["versions"].keys() >= {"python", "torch", "numpy", "lightning"}


def test_results_lie_in_the_repository() -> None:
    assert (provenance.RESULTS / "step.json").exists()
    assert (provenance.ROOT / "pyproject.toml").exists()
