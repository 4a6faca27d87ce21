"""`swiftmoe plan TRACE --recommend`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from swiftmoe_lightning.cli import app
from tests.analysis.test_sweep import trace


def trace_file(folder: Path, sources: int = 4) -> str:
    counts = trace().counts_UWLE
    metadata = np.array(json.dumps({"world_size": 4, "layers": ["a", "b"]}))
    np.savez(folder / "trace.npz", counts=counts if sources > 1 else counts.sum(1), metadata=metadata)
    return str(folder / "trace.npz")


def recommended(*argv: str) -> Any:
    return CliRunner().invoke(app, ["plan", *argv, "--recommend"])


def test_it_says_what_to_take_why_and_what_more_would_buy(tmp_path: Path) -> None:
    result = recommended(trace_file(tmp_path), "--picture", str(tmp_path / "sweep.png"))
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [f"replaying groups of {size} ..." for size in (1, 2, 4)]
    text = " ".join(result.stdout.split())
    assert text.startswith("Take expert_parallel_size=4, slots_per_rank=")
    for phrase in (
        "would make it",
        "Groups of 4 take the least time",
        "Slots of a rank in groups of 4, and what the next number of them would change",
        "Replayed 12 of 12 steps, and 2 of 2 layers, on 4 ranks; of more than two groups the first and the last.",
        "Not known: the time of tokens on the wire",
        "Not known: the time of the experts",
    ):
        assert phrase in text, result.stdout
    assert (tmp_path / "sweep.png").stat().st_size > 20_000
    # In the table of slots one row is marked, of six; in that of groups one of three.
    assert len(re.findall(r"^ +\* ", result.stdout, flags=re.MULTILINE)) == 2


def test_as_json_it_is_one_object_with_all_points(tmp_path: Path) -> None:
    argv = (trace_file(tmp_path), "--json", "--most-dropped", "0", "--gpu-gbytes", "0.05")
    result = recommended(*argv)
    assert (result.exit_code, result.stderr) == (0, "")
    actual = json.loads(result.stdout)
    assert len(actual["why"]) == 3
    size, slots = (actual["settings"][name] for name in ("expert_parallel_size", "slots_per_rank"))
    (point,) = (p for p in actual["points"] if (p["group_size"], p["slots_per_rank"]) == (size, slots))
    assert point["fits"]
    assert actual["knees"][str(size)] == slots
    # Two layers of a fifth slot, with the 32 MB of state, are more than 80 % of 50 MB.
    assert [p["slots_per_rank"] for p in actual["points"] if p["group_size"] == 4 and p["fits"]] == [2, 3, 4]
    assert (actual["ranks"], actual["steps"], actual["layers"]) == (4, [[0, 12]], ["a", "b"])


def test_without_the_ranks_of_tokens_it_says_what_is_not_known(tmp_path: Path) -> None:
    result = recommended(trace_file(tmp_path, sources=1), "--token-bytes", "2", "--tflops", "1", "--link-gbps", "100")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "Not known: groups of 1, 2, since the trace does not tell the tokens of 4 ranks apart." in text
    assert text.count("Not known") == 1
    assert "No other group size was compared." in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--recommend", "--slots", "3"], "--slots does not go with --recommend"),
        (["--recommend", "--policies", "symi"], "--policies does not go with --recommend"),
        (["--picture", "x.png"], "--picture is for recommendations. Add --recommend, or leave it out."),
        (["--most-dropped", "0.1"], "--most-dropped is for recommendations."),
        (["--recommend", "--gpu-gbytes", "0.000001"], "no group size fits: 2 slots in groups of 4 need least"),
        (["--recommend", "--tflops", "1"], "Give both link_bytes and flops"),
        (["--recommend", "--picture", "."], "is a folder, and a file is to be written."),
    ],
)
def test_options_that_do_not_go_together_end_with_one_line(tmp_path: Path, argv: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", trace_file(tmp_path), "--json", *argv])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("swiftmoe plan: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_is_not_installed_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    # There is no such trace, which is not even looked for.
    result = recommended("nowhere.npz", "--picture", str(tmp_path / "sweep.png"))
    assert result.exit_code == 2
    assert result.output.count('pip install "swiftmoe-lightning[report]"') == 1
    assert "nowhere" not in result.output
    (tmp_path / "trace.parquet").write_bytes(b"PAR1")
    for command in ("plan", "report"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "trace.parquet")])
        assert result.exit_code == 2
        assert result.output.count('pip install "swiftmoe-lightning[parquet]"') == 1
        assert result.output.count("\n") == 1
