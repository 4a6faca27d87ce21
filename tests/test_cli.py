from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from swiftmoe_lightning.cli import app


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["train", *words])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("words", "message"),
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
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    # Seeding leaves these behind.
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    code, output = run("--data", __file__, *words) if "--data" not in words else run(*words)
    assert code == 2
    assert output.startswith(f"swiftmoe train: {message}")


def test_too_small_a_file_ends_with_one_line(tmp_path: Path) -> None:
    (tmp_path / "small.txt").write_text("To be, or not to be")
    code, output = run("--data", str(tmp_path / "small.txt"))
    assert code == 2
    assert output.startswith("swiftmoe train: the text of 19 bytes is too small for sequences of 128 bytes")


@pytest.mark.parametrize("words", [["--steps", "0"], ["--lr", "-1"], ["--strategy", "dynamic"], ["--step", "3"]])
def test_an_option_out_of_range_is_refused(words: list[str]) -> None:
    code, output = run(*words)
    assert code == 2
    assert words[0] in output


def test_help_names_every_option() -> None:
    _, output = run("--help")
    for name in ("strategy", "data", "capacity-factor", "slots-per-rank", "aux-loss-coef", "seed", "out"):
        assert f"--{name}" in output
