"""Files that `swiftmoe plan`, `report` and `train` are given: each ends in one line, or in a whole page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from swiftmoe_lightning.analysis.write_trace import write_npz
from swiftmoe_lightning.cli import app
from tests.analysis.cases import METADATA, recording


def run(*argv: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, argv)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def refusal(*argv: str | Path) -> str:
    code, output = run(*argv)
    assert code == 2
    assert output.startswith(f"swiftmoe {argv[0]}: ")
    assert output.count("\n") == 1
    return output


@pytest.mark.parametrize("command", ["plan", "report"])
def test_a_pipe_is_refused_at_once(tmp_path: Path, command: str) -> None:
    os.mkfifo(tmp_path / "trace.npz")
    assert "it is no regular file, but a pipe, socket or device." in refusal(command, tmp_path / "trace.npz")


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        (["--capacity-factor", "1e300"], {}, "capacity_factor must be at most 1000, got 1e+300."),
        (["--ranks", "1000000000"], {}, "ranks must be at most 65536, got 1000000000."),
        ([], {"world_size": 10**9}, "world_size of the trace's metadata must be at most 65536, got 1000000000."),
        ([], {"slots_per_rank": 10**9}, "slots_per_rank of the trace's metadata must be at most 65536, got"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "report"])
def test_sizes_out_of_bounds_are_refused(
    tmp_path: Path, command: str, options: list[str], changed: dict[str, Any], message: str
) -> None:
    write_npz(tmp_path / "trace.npz", recording(), METADATA | changed)
    assert message in refusal(command, tmp_path / "trace.npz", *options)


def test_a_damaged_recording_is_not_drawn(tmp_path: Path) -> None:
    write_npz(tmp_path / "trace.npz", recording() | {"dropped": np.array([[10**7], [0]])}, METADATA)
    line = refusal("report", tmp_path / "trace.npz", "--out", tmp_path / "page.html")
    assert (
        "dropped must be at most the assignments of its step, got 10000000 of 12 in row 0, layer 0: the trace" in line
    )
    assert not (tmp_path / "page.html").exists()


def test_a_name_that_is_not_unicode_makes_a_page(tmp_path: Path) -> None:
    trace, out = (tmp_path / os.fsdecode(b"r\xfcn" + end) for end in (b".npz", b".html"))
    write_npz(trace, recording(), METADATA)
    code, output = run("report", trace, "--out", out)
    assert code == 0
    assert "r\ufffdn.html: " in output
    assert "<title>r?n.npz" in out.read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    write_npz(tmp_path / "trace.npz", recording(), METADATA)
    # One line: no policy has been replayed before it.
    assert "is a folder, and a file is to be written." in refusal("report", tmp_path / "trace.npz", "--out", tmp_path)
