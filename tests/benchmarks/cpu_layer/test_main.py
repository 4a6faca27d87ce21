"""The CPU layer benchmark on a tiny layer: that it compares equal outputs, not how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks.cpu_layer import __main__ as command


def test_a_small_run_compares_equal_outputs(
    result: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = (command.Shape(16, 8, 8, 4, 2), command.Shape(16, 8, 8, 4, 2, "bfloat16"))
    monkeypatch.setattr(command, "SHAPES", shapes)
    command.main(["--name", "tiny", "--pairs", "1"])
    single, half = result("tiny")["layers"]
    assert (single["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert single["relative_difference"] < 1e-5
    assert half["relative_difference"] < 1e-2
    assert single["ms"]["swiftmoe"]["count"] == single["ms"]["grouped_mm"]["count"] == 2
    assert single["ratio"]["median"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == [
        f"tokens 16, dim 8, hidden_dim 8, experts 4, top_k 2, dtype {dtype}" for dtype in ("float32", "bfloat16")
    ]
