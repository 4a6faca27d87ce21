"""The checkpoint benchmark on a few kilobytes: that everything is measured, not how fast it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints import __main__ as command

TINY = "--layers 1 --dim 16 --hidden-dim 16 --experts 4 --pairs 1"


def test_a_small_run_measures_everything_and_leaves_no_files(
    result: Callable[[str], dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([*TINY.split(), "--name", "tiny"])
    written = result("tiny")
    compared = {"save_file", "load_file", "load_directory"}
    assert written.keys() == {"certificate", "sizes", "gigabytes", "check_gb_per_s"} | compared
    for name in compared:
        assert written[name]["ours_s"]["count"] == written[name]["theirs_s"]["count"] == 2
        assert written[name]["ratio"]["count"] == 1
    # 3 matrices of 4 experts in float32, and what the file adds.
    assert 4 * 3 * 4 * 16 * 16 < 1e9 * written["gigabytes"] < 1e5
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]
    assert "load_directory" in capsys.readouterr().out
