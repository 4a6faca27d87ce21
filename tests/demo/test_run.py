from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning.demo.options import DemoOptions
from swiftmoe_lightning.demo.run import Demo, Ranks
from tests.helpers import nightly, run_ranks, run_script

TINY = {
    "strategy": "swiftmoe",
    "steps": 4,
    "layers": 2,
    "dim": 32,
    "hidden_dim": 16,
    "experts": 4,
    "seq_len": 16,
    "batch_size": 8,
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog; what it thinks of it nobody knows.\n" * 20)
    return path


def arguments(**options: Any) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize(
    ("command", "strategy"),
    [
        ([str(Path(sys.executable).with_name("swiftmoe"))], "swiftmoe"),
        *nightly(([sys.executable, "-m", "swiftmoe_lightning"], "static")),
    ],
)
def test_the_command_starts_its_ranks_and_ends_with_table_picture_and_files(
    command: list[str], strategy: str, text: Path, tmp_path: Path
) -> None:
    options = arguments(**{**TINY, "strategy": strategy}, ranks=2, data=text)
    result = run_script(*command, "train", *options, cwd=tmp_path)
    # One rank speaks, and its children do not.
    for line in (
        f"{strategy}: 4 steps on 2 ranks",
        "validation loss",
        "token survival rate",
        "replicas moved per step, all layers",
    ):
        assert result.stdout.count(line) == 1, result.stdout
    assert "Warning" not in result.stderr

    folder = tmp_path / "runs" / strategy
    assert (folder / "picture.png").stat().st_size > 20_000
    with np.load(folder / "placements.npz") as recorded:
        assert recorded["counts"].shape == (4, 2, 2, 4)
        assert recorded["counts"].sum((1, 3)).tolist() == [[8 * 16] * 2] * 4
        assert (recorded["moved"].sum() == 0) == (strategy == "static")
    with (folder / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 4
    assert f"-> {losses[-1]:.3f}" in result.stdout
    assert f"strategy: {strategy}" in (folder / "hparams.yaml").read_text()


def test_by_default_both_strategies_run_and_are_compared(text: Path, tmp_path: Path) -> None:
    tiny = {name: value for name, value in TINY.items() if name != "strategy"}
    # Without a capacity both train alike from the first step on.
    options = arguments(**tiny, ranks=2, data=text, capacity_factor=0)
    result = run_script(sys.executable, "-m", "swiftmoe_lightning", "train", *options, cwd=tmp_path)
    assert result.stdout.count("Files: runs/ (comparison.png, static/, swiftmoe/)") == 1
    assert re.search(r"swiftmoe [^.].*dropped \d+\.\d% of", " ".join(result.stdout.split())), result.stdout
    # The way goes on from here, and all of it fits a screen.
    behind_progress = result.stdout.partition("4 steps of 2 layers")[2].splitlines()
    assert behind_progress[-2:] == [
        "Look closer:  swiftmoe report runs/swiftmoe",
        "Choose slots: swiftmoe plan runs/swiftmoe/placements.npz --recommend",
    ]
    assert len(behind_progress) <= 24
    assert max(map(len, behind_progress)) <= 80
    assert (tmp_path / "runs" / "comparison.png").stat().st_size > 20_000
    first = {}
    for strategy in ("static", "swiftmoe"):
        folder = tmp_path / "runs" / strategy
        with (folder / "metrics.csv").open() as file:
            first[strategy] = next(row["train/loss"] for row in csv.DictReader(file) if row["train/loss"])
        assert (folder / "placements.npz").exists()
    assert first["static"] == first["swiftmoe"]


class Run:
    """One demo on the ranks that are there; returns its validation losses and what it printed."""

    def __init__(self, without_matplotlib: bool = False, **options: Any) -> None:
        self.without_matplotlib, self.options = without_matplotlib, options

    def __call__(self) -> tuple[list[float], str]:
        if self.without_matplotlib:
            sys.modules["matplotlib.figure"] = None  # type: ignore[assignment]
        demo = Demo(DemoOptions(**{**TINY, **self.options}))
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            demo.run()
        return demo._model.val_losses, printed.getvalue()


@pytest.mark.nightly
def test_runs_of_one_seed_begin_alike_whatever_the_strategy_and_the_number_of_ranks(text: Path, tmp_path: Path) -> None:
    first: dict[Any, float] = {}
    last: dict[Any, float] = {}
    for key, world_size, options in (
        ("swiftmoe", 2, {}),
        ("static", 2, {"strategy": "static"}),
        ("one rank", 1, {}),
        ("other seed", 2, {"seed": 1}),
    ):
        run = Run(data=text, out=tmp_path / key, capacity_factor=0, **options)
        for losses, _ in run_ranks(run, world_size, init=False):
            assert len(losses) == 5
            assert losses[-1] < losses[0]
            first[key], last[key] = losses[0], losses[-1]
    assert first["static"] == first["swiftmoe"] == pytest.approx(first["one rank"], rel=1e-6)
    # Without a capacity even the end is the same: placements change where, not what, is computed.
    assert last["static"] == pytest.approx(last["swiftmoe"], rel=1e-4)
    assert last["one rank"] == pytest.approx(last["swiftmoe"], rel=1e-4)
    assert first["other seed"] != first["swiftmoe"]


def test_without_matplotlib_the_run_still_ends_with_its_table(text: Path, tmp_path: Path) -> None:
    ((_, printed),) = run_ranks(Run(True, data=text, out=tmp_path), 1, init=False)
    assert "validation loss" in printed
    needed = 'No picture: the picture needs matplotlib. Run `pip install "swiftmoe-lightning[report]"`'
    # Once, and before the training, so that it can be stopped.
    assert " ".join(printed.split()).startswith(needed)
    assert printed.count("pip install") == 1
    assert "(metrics.csv, placements.npz)" in printed
    assert not (tmp_path / "picture.png").exists()


def test_a_folder_whose_name_is_not_unicode_is_shown_as_far_as_it_is(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"r\xfcns")
    ((_, printed),) = run_ranks(Run(data=text, out=folder), 1, init=False)
    assert "/r\ufffdns/ (picture.png, metrics.csv, placements.npz)" in printed
    assert (folder / "placements.npz").exists()


def test_torchruns_ranks_are_taken_and_no_others(monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "6")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert (Ranks.find(None).per_node, Ranks.find(6).num_nodes, Ranks.find(6).total) == (3, 2, 6)
    with pytest.raises(ValueError, match=r"--ranks is 4, but torchrun started 6\. Leave --ranks out"):
        Ranks.find(4)


def test_more_ranks_than_gpus_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Ranks.find(None) == Ranks("cuda", 2)
    with pytest.raises(ValueError, match=r"--ranks is 3, but there are 2 GPUs"):
        Ranks.find(3)
