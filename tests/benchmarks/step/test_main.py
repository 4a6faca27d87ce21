"""The step benchmark on two ranks and a tiny model: that everything is measured and adds up, not how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.step import __main__ as command

TINY = "--ranks 2 --rounds 1 --pairs 1 --steps 1 --repeats 1 --layers 1 --dim 16 --hidden-dim 16 --tokens 32"


def test_a_small_run_measures_everything(
    result: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([*TINY.split(), "--name", "tiny"])
    written = result("tiny")
    settings = {"sizes", "effort"}
    ratios = {"adapting", "control", "update", "update_fused"}
    assert written.keys() == {"certificate", "bytes", "phases_ms"} | settings | ratios
    for name in ratios:
        assert written[name]["wall_ratio"]["median"] > 0
        assert written[name]["cpu_ratio"]["count"] == 1
    # Both keep bytes and balance, and only one of them moves experts.
    run, baseline = (written["adapting"][role] for role in ("run", "baseline"))
    assert baseline["pairs_moved_per_step"] == 0
    assert run["bytes_sent_per_step"] == baseline["bytes_sent_per_step"]
    assert written["bytes"]["collect_all_ranks"] == written["bytes"]["formula_all_ranks"] > 0
    phases = {"forward", "count", "backward", "collect", "clip", "update", "place", "distribute", "arrive"}
    assert written["phases_ms"].keys() == {"adapting", "fixed"}
    assert all(times.keys() == phases for times in written["phases_ms"].values())
    table = capsys.readouterr().out
    assert "step, adapting / fixed, wall time" in table
    assert table.splitlines()[-1].endswith("tiny.json")


def test_ranks_must_divide_the_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--ranks", "3"])
    assert "--ranks must be 2 or more and divide --dim and --hidden-dim, got 3" in capsys.readouterr().err
