"""The command on a tiny preset: runs that are on disk are not run again, and the last line is what it is said to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.common import provenance
from benchmarks.convergence import figures, step_times
from benchmarks.convergence.__main__ import main
from benchmarks.convergence.corpus import Corpus
from benchmarks.convergence.presets import PRESETS
from benchmarks.convergence.training import Run, train
from tests.helpers import run_ranks

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


@pytest.mark.parametrize("name", ["loss", "drops", "replicas"])
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
    plan = step_times.Plan(setting=setting, rounds=1, cache=folder / "corpus")
    measured = run_ranks(step_times.measure, 2, plan, ("static", "balanced"))[0]
    assert measured["step_ms"].keys() == {"static", "balanced"}
    assert measured["step_time_over_static"]["static"]["median"] == 1
    assert measured["step_time_over_static"]["balanced"]["median"] > 0
    assert measured["largest_load_over_static"]["balanced"]["median"] < 0.95
