from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import swiftmoe_lightning
from swiftmoe_lightning.analysis import CANDIDATES
from swiftmoe_lightning.cli import app


def run(*argv: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *argv])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dim", "100"], "--dim must be a multiple of 32, the width of an attention head, got 100."),
        (["--top-k", "9", "--experts", "8"], "--top-k must be at most --experts (8), got 9."),
        (["--batch-size", "10", "--ranks", "4"], "--batch-size must be a multiple of the 4 ranks, got 10."),
        (["--slots-per-rank", "1"], "4 ranks x 1 slots = 4 slots cannot hold 16 experts"),
        (["--data", "nowhere.txt"], "--data: there is no file 'nowhere.txt'."),
        (["--capacity-factor", "inf"], "capacity_factor must be a number above 0, got inf."),
    ],
)
def test_settings_that_do_not_go_together_end_with_one_line(
    argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # Seeding leaves these behind.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    code, output = run("--data", __file__, *argv) if "--data" not in argv else run(*argv)
    assert code == 2
    assert output.startswith(f"swiftmoe train: {message}")


def test_too_small_a_file_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("To be, or not to be")
    code, output = run("--data", str(tmp_path / "small.txt"))
    assert code == 2
    assert output.startswith("swiftmoe train: the text of 19 bytes is too small for sequences of 128 bytes")


@pytest.mark.parametrize("argv", [["--steps", "0"], ["--lr", "-1"], ["--strategy", "dynamic"], ["--step", "3"]])
def test_an_option_out_of_range_is_refused(argv: list[str]) -> None:
    code, output = run(*argv)
    assert code == 2
    assert argv[0] in output


def test_help_names_every_option() -> None:
    _, output = run("--help")
    for name in ("strategy", "data", "capacity-factor", "slots-per-rank", "aux-loss-coef", "seed", "out"):
        assert f"--{name}" in output


def test_the_version_is_that_of_the_installed_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"swiftmoe-lightning {swiftmoe_lightning.__version__}\n")
    assert re.fullmatch(r"\d+\.\d+\.\d+", swiftmoe_lightning.__version__)


# [4 steps, 2 ranks, 1 layer, 4 experts]; what the run itself did is there, too.
COUNTS = np.array([[[[9, 1, 1, 1]], [[7, 3, 1, 1]]], [[[1, 9, 1, 1]], [[3, 7, 1, 1]]]] * 2)
METADATA = {"format_version": 1, "world_size": 2, "slots_per_rank": 3, "capacity_factor": 1.0, "layers": ["moe"]}
RECORDED = {
    "replicas": np.full((4, 1, 4), 1),
    "loads": np.full((4, 1, 2), 11),
    "dropped": np.full((4, 1), 2),
    "moved": np.full((4, 1), 1),
}


def trace_file(folder: Path, name: str = "trace.npz", **arrays: Any) -> str:
    metadata = np.array(json.dumps(arrays.pop("metadata", METADATA)))
    np.savez(folder / name, **{"counts": COUNTS, "metadata": metadata, **arrays})
    return str(folder / name)


def plan(*argv: str) -> Any:
    return CliRunner().invoke(app, ["plan", *argv])


def report(*argv: str) -> Any:
    return CliRunner().invoke(app, ["report", *argv])


def assert_one_line(result: Any, start: str) -> None:
    """What a user is told of a mistake: one line, no traceback, nothing on standard output."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith(start)
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_a_plan_is_a_table_with_one_row_a_policy(tmp_path: Path) -> None:
    result = plan(trace_file(tmp_path), "--capacity-factor", "1")
    assert result.exit_code == 0
    text = result.stdout
    assert "4 steps, 1 layer, 4 experts on 2 ranks of 3 slots, capacity factor 1, plans 1 step old" in " ".join(
        text.split()
    )
    rows = [line.split()[0] for line in text.splitlines() if line.strip()]
    first = rows.index("policy")
    assert [rows[first], *rows[first + 2 : first + 7]] == ["policy", "balanced", "packed", "symi", "static", "best"]
    assert result.stderr.splitlines() == [f"replaying {p} ..." for p in ("balanced", "packed", "symi", "static")]


def test_a_plan_as_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    result = plan(trace_file(tmp_path), "--capacity-factor", "1", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    actual = json.loads(result.stdout)
    assert list(actual["policies"]) == ["balanced", "packed", "symi", "static"]
    assert (actual["ranks"], actual["slots_per_rank"], actual["capacity_factor"], actual["lag"]) == (2, 3, 1.0, 1)
    # Static: [0 0 1 | 1 2 3], budgets of 4 a slot. Experts 0 and 1 have 16 and 4 assignments, then 4 and 16, of which 8
    # and 4, then 4 and 8 are computed; the cold experts have 2 each.
    assert actual["policies"]["static"]["dropped"] == 8 / 24


def test_a_plan_of_all_policies_has_them_all_in_full_at_any_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    argv = ("--policies", "all", "--link-gbps", "100", "--tflops", "100")
    result = plan(trace_file(tmp_path), *argv)
    assert result.exit_code == 0
    assert "…" not in result.stdout
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    assert list(json.loads(plan(trace_file(tmp_path), *argv, "--json").stdout)["policies"]) == list(CANDIDATES)
    for name in CANDIDATES:
        assert rows[name][-1] == "ms"
    assert "paper's step" in result.stdout


def test_options_of_a_plan_reach_it(tmp_path: Path) -> None:
    argv = ["--ranks", "4", "--slots", "2", "--capacity-factor", "1.5", "--capacity-per", "rank", "--lag", "2"]
    argv += ["--policies", " symi , lpt", "--experts-bytes", "10", "--state-bytes", "7"]
    actual = json.loads(plan(trace_file(tmp_path), *argv, "--json").stdout)
    assert (actual["ranks"], actual["slots_per_rank"], actual["capacity_factor"], actual["lag"]) == (4, 2, 1.5, 2)
    assert actual["expert_bytes"] == 10
    assert {name: values["capacity_per"] for name, values in actual["policies"].items()} == {
        "symi": "rank",
        "lpt": "rank",
    }
    assert actual["policies"]["symi"]["step_seconds"] is None
    assert actual["policies"]["lpt"]["bytes_state_moved"] == round(actual["policies"]["lpt"]["replicas_moved"] * 17)


@pytest.mark.parametrize("cadence", ["2", "auto"])
def test_a_plan_may_be_made_now_and_then(tmp_path: Path, cadence: str) -> None:
    argv = [trace_file(tmp_path), "--policies", "symi", "--json"]
    often = json.loads(plan(*argv).stdout)["policies"]["symi"]["replicas_moved"]
    seldom = json.loads(plan(*argv, "--replace-every", cadence).stdout)["policies"]["symi"]["replicas_moved"]
    assert (seldom < often) if cadence == "2" else (seldom <= often)


@pytest.mark.parametrize("argv", [(), ("--capacity-factor", "0")])
def test_a_plan_without_a_capacity_factor_drops_nothing_though_the_run_did(
    tmp_path: Path, argv: tuple[str, ...]
) -> None:
    actual = json.loads(plan(trace_file(tmp_path), *argv, "--json").stdout)
    assert actual["capacity_factor"] is None
    assert [values["dropped"] for values in actual["policies"].values()] == [0, 0, 0, 0]


BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"counts": -COUNTS}, "counts must be whole numbers of 0 or more, got -9"),
    "fractions": ({"counts": COUNTS / 7}, "counts must be whole numbers of 0 or more"),
    "not finite": ({"counts": COUNTS * np.nan}, "counts must be whole numbers of 0 or more, got nan"),
    "no tokens": ({"counts": 0 * COUNTS}, "are all 0, and a plan needs at least one assignment"),
    "no steps": ({"counts": COUNTS[:0]}, "counts must hold at least one step, rank, layer and expert"),
    "axes": ({"counts": COUNTS[0, 0]}, "`counts` must be [steps, layers, experts]"),
    "objects": ({"counts": np.array([None])}, "objects are never unpickled"),
    "text": ({"counts": COUNTS.astype(str)}, "counts must be whole numbers, got dtype <U"),
    "other steps": ({"step": np.arange(3)}, "step must hold one number for each of the 4 steps"),
    "other loads": ({"loads": np.zeros((4, 1, 5))}, "loads must have the axes"),
    "other names": ({"metadata": {"layers": ["a", "b"]}}, "layers must name the 1 layers"),
    "other version": ({"metadata": {"format_version": 9}}, "its format_version is 9"),
    "ranks of metadata": ({"metadata": {**METADATA, "world_size": [2]}}, "world_size of the trace's metadata"),
    "slots of metadata": ({"metadata": {**METADATA, "slots_per_rank": "x"}}, "slots_per_rank of the trace's metadata"),
    "capacity of metadata": ({"metadata": {**METADATA, "capacity_factor": "x"}}, "capacity_factor of the trace's"),
}


@pytest.mark.parametrize("command", ["plan", "report"])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_a_bad_trace_ends_with_one_line(tmp_path: Path, case: str, command: str) -> None:
    arrays, message = BAD_ARRAYS[case]
    argv = [] if command == "plan" else ["--out", str(tmp_path / "page.html")]
    result = CliRunner().invoke(app, [command, trace_file(tmp_path, **arrays), *argv])
    assert_one_line(result, f"swiftmoe {command}: ")
    assert message in result.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.npz", b"", "the file is empty"),
        ("text.npz", b"step,layer,count\n", "it is no trace: its first bytes are b'step'"),
        ("cut.npz", b"PK\x03\x04 and no more", "the archive is cut off or damaged"),
        ("cut.parquet", b"PAR1 and no more", "the file is cut off or damaged"),
        ("words.jsonl", b"not json\n", "it is not JSON"),
        ("other.jsonl", b'{"loss": 1}\n', "it has no step, layer"),
    ],
)
def test_a_file_that_is_no_trace_ends_with_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    result = plan(str(tmp_path / name))
    assert_one_line(result, f"swiftmoe plan: {tmp_path / name}: ")
    assert message in result.stderr


def test_no_file_and_no_trace_in_a_folder_end_with_one_line(tmp_path: Path) -> None:
    for run_command in (plan, report):
        assert "there is no file" in run_command(str(tmp_path / "nowhere.npz")).stderr
        result = run_command(str(tmp_path))
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert "it is a folder without" in result.stderr


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--policies", "best"], "policy must be one of"),
        (["--policies", ""], "name at least one policy of balanced"),
        (["--slots", "1"], "2 slots cannot hold 4 experts"),
        (["--replace-every", "often"], "replace_every must be a whole number of 1 or more, got 'often'"),
        (["--replace-every", "0"], "replace_every must be a whole number of 1 or more, got 0"),
        (["--capacity-factor", "inf"], "capacity_factor must be a number above 0, got inf"),
        (["--capacity-per", "node"], "capacity_per must be one of 'rank', 'slot', got 'node'"),
        (["--tflops", "100"], "Give both link_bytes and flops"),
        (["--tflops", "100", "--link-gbps", "0"], "link_bytes must be a number above 0, got 0.0"),
    ],
)
def test_options_of_a_plan_that_do_not_go_together_end_with_one_line(
    argv: list[str], message: str, tmp_path: Path
) -> None:
    result = plan(trace_file(tmp_path), *argv)
    assert_one_line(result, "swiftmoe plan: ")
    assert message in result.stderr


@pytest.mark.parametrize("argv", [["--ranks", "0"], ["--slots", "0"], ["--lag", "-1"], ["--experts-bytes", "0"]])
def test_a_plans_option_out_of_range_is_refused(argv: list[str], tmp_path: Path) -> None:
    result = plan(trace_file(tmp_path), *argv)
    assert result.exit_code == 2
    assert argv[0] in result.stderr


def test_a_trace_that_does_not_tell_its_ranks_needs_them(tmp_path: Path) -> None:
    path = trace_file(tmp_path, metadata={})
    assert_one_line(plan(path), "swiftmoe plan: the trace does not say how many ranks to plan for. Add --ranks.")
    assert_one_line(
        plan(path, "--ranks", "2"), "swiftmoe plan: the trace does not say how many slots to plan for. Add --slots."
    )
    assert plan(path, "--ranks", "2", "--slots", "3").exit_code == 0


def test_a_report_of_a_trace_is_one_page_that_loads_nothing(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = report(trace_file(tmp_path), "--out", str(out), "--policies", "balanced,symi")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: {out.stat().st_size / 1e6:.1f} MB. Open it in a browser.\n"
    html = out.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\"'\s]*", html)) == {"http://www.w3.org/2000/svg"}
    assert "<title>trace.npz" in html
    assert re.findall(r'<th scope="row" data-policy="\d">(.*?)<', html) == ["balanced", "symi"]
    assert "factor 1." in html


def test_a_report_of_a_run_folder_shows_the_run_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-run").mkdir()
    trace_file(tmp_path / "my-run", "placements.npz", **RECORDED)
    monkeypatch.chdir(tmp_path)
    result = report("my-run", "--capacity-factor", "0")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("report.html: 0.")
    html = Path("report.html").read_text(encoding="utf-8")
    assert "<title>my-run" in html
    assert re.findall(r'<th scope="row" data-policy="\d">(.*?)<', html)[0] == "recorded"


def test_a_report_takes_megatrons_folder_as_a_plan_does(tmp_path: Path) -> None:
    line = {"step": 0, "layer": 0, "rank": 0, "num_tokens": 2, "topk": 1, "top_indices": [[0], [1]]}
    (tmp_path / "router_trace_rank0.jsonl").write_text(json.dumps(line) + "\n")
    argv = [str(tmp_path), "--ranks", "2", "--slots", "2"]
    assert plan(*argv).exit_code == 0
    assert report(*argv, "--out", str(tmp_path / "page.html")).exit_code == 0


def test_a_page_that_cannot_be_written_ends_with_one_line(tmp_path: Path) -> None:
    result = report(trace_file(tmp_path), "--out", str(tmp_path / "nowhere" / "page.html"), "--policies", "static")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "replaying static ..."
    assert result.stderr.splitlines()[1].startswith("swiftmoe report: ")
    assert "No such file or directory" in result.stderr
    assert len(result.stderr.splitlines()) == 2
