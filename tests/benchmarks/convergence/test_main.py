"""The command on a tiny preset: runs that are on disk are not run again, and the last line is what it is said to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.common import provenance
from benchmarks.convergence import figures, real_ranks, step_times
from benchmarks.convergence.__main__ import main
from benchmarks.convergence.corpus import Corpus
from benchmarks.convergence.presets import PRESETS
from benchmarks.convergence.training import Run, train
from tests.helpers import nightly, run_ranks

SMOKE = PRESETS["smoke"][0]
TEXT = np.random.default_rng(0).integers(0, 40, 4000).astype(np.uint8)
CORPUS = Corpus(TEXT, TEXT)
FIGURES_SAVED = {
    "steps_saved_over_static",
    "time_saved_over_static",
    "time_saved_over_flexmoe",
    "drops_saved_over_static",
    "drops_saved_over_flexmoe_10",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus and the runs of the preset but one."""
    folder = tmp_path_factory.mktemp("convergence")
    (folder / "corpus").mkdir()
    CORPUS.save(folder / "corpus" / "shakespeare.npz")
    for task in SMOKE.tasks[:-1]:
        train(task.setting, task.system, task.seed, CORPUS).save(task.path(folder), task.setting, {})
    return folder


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(provenance, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.nightly
def test_what_is_missing_is_run_and_everything_compared(
    folder: Path, results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--preset", "smoke", "--folder", str(folder)])
    saved = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(saved) == ["flexmoe-100", "flexmoe-50", "flexmoe-10", "symi", "balanced"]
    for figures_of_system in saved.values():
        assert figures_of_system.keys() >= FIGURES_SAVED
        assert all(figure.keys() == {"median", "min", "max", "runs"} for figure in figures_of_system.values())
        assert all(figure["runs"] == 1 for figure in figures_of_system.values())
    assert saved["balanced"]["drops_saved_over_static"]["median"] > 0.3
    written = json.loads((results / "convergence_smoke.json").read_text())[SMOKE.title]
    assert written["saved"] == saved
    assert len(written["runs"]["balanced-0"]["validation_loss"]) == 5
    # The last task was run by another process.
    (task,) = SMOKE.tasks[-1:]
    assert Run.load(task.path(folder)).train_loss == pytest.approx(
        train(task.setting, task.system, task.seed, CORPUS).train_loss, rel=1e-5
    )


@pytest.mark.parametrize("name", [*nightly("loss"), "drops", "replicas"])
def test_a_figure_is_drawn(folder: Path, name: str) -> None:
    figures.main([name, "--preset", "smoke", "--folder", str(folder)])
    assert (folder / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["time-to-loss", "step-time"])
def test_a_table_has_the_papers_numbers_beside_ours(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    figures.main([name, "--preset", "smoke", "--folder", str(folder)])
    (symi,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│ symi")]
    assert {"time-to-loss": "0.695", "step-time": "0.971"}[name] in symi


def test_steps_are_timed_on_real_ranks(folder: Path) -> None:
    setting = replace(SMOKE.setting, num_ranks=2, slots_per_rank=16, capacity_factor=None, num_steps=12)
    plan = step_times.Plan(setting, 1, folder / "corpus", None)
    measured = run_ranks(step_times.measure, 2, plan, ("static", "balanced"))[0]
    assert measured["step_ms"].keys() == {"static", "balanced"}
    assert measured["step_time_over_static"]["static"]["median"] == 1
    assert measured["step_time_over_static"]["balanced"]["median"] > 0
    assert measured["largest_load_over_static"]["balanced"]["median"] < 0.95
    for system, phases in measured["phases_ms"].items():
        medians = {phase: ms["median"] for phase, ms in phases.items()}
        # Means over ranks, and the step is that of the slowest.
        assert 0 < sum(medians.values()) <= measured["step_ms"][system]["median"] * (1 + 1e-9)
        assert all(ms > 0 for phase, ms in medians.items() if phase != "move")
        assert (medians["move"] > 0) == (system == "static")


PHASES_MS = {phase: {"median": 1.0} for phase in real_ranks.PHASES} | {"count": {"median": 3.0}}


def test_phases_are_shown_by_system_with_what_is_new_in_them(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recorded = {"loopback": {"phases_ms": {"static": PHASES_MS, "balanced": PHASES_MS}}, "measured before": {}}
    monkeypatch.setattr(figures, "recorded_step_times", lambda: recorded)
    figures.main(["phases", "--preset", "smoke", "--folder", str(folder)])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    by_phase = {row[0]: row[2:] for row in rows if len(row) == 4}
    assert by_phase["count"] == ["3.0 (18.8%)"] * 2
    assert by_phase["backward"] == ["1.0 (6.2%)"] * 2
    assert by_phase["all"] == ["16.0"] * 2
    assert by_phase["new"] == ["25.0%"] * 2


def test_phases_that_nobody_measured_are_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "recorded_step_times", lambda: {"measured before": {}})
    with pytest.raises(SystemExit, match=r"Run python -m benchmarks\.convergence\.step_times first"):
        figures.main(["phases", "--preset", "smoke", "--folder", str(folder)])


def test_real_ranks_are_shown_beside_the_emulation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real_ranks.main(["--system", "symi", "--preset", "smoke", "--steps", "3", "--folder", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "symi on 4 gloo ranks, and emulated"
    losses = [line.split() for line in lines[2:-1]]
    assert [step for step, *_ in losses] == ["0", "1", "2"]
    for _, real, emulated, real_dropped, emulated_dropped in losses:
        assert float(real) == pytest.approx(float(emulated), abs=2e-5)
        assert real_dropped == emulated_dropped != "0.00%"
    assert lines[-1].endswith("dropped 0.00%")


@pytest.mark.parametrize("command", [real_ranks, step_times])
def test_ranks_must_divide_slots_and_sequences(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--ranks", "3"])
    assert "64 slots and 16 sequences a step cannot be divided over 3 ranks" in capsys.readouterr().err


def test_links_that_cannot_be_shaped_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_times, "missing_for_links", lambda: "There is no root.")
    with pytest.raises(SystemExit):
        step_times.main(["--mbit", "100"])
    assert "--mbit 100: There is no root." in capsys.readouterr().err
