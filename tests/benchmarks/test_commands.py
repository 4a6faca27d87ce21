"""What all benchmarks' commands have in common."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(path.parent.name for path in FOLDER.glob("*/__main__.py"))


def test_there_are_benchmarks() -> None:
    ours = "checkpoints convergence cpu_layer evaluation gpu huggingface_ep kills lost_node placement step"
    assert ours.split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_help_tells_what_is_measured_and_written(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name == "cpu_layer":
        pytest.importorskip("transformers")
    command = import_module(f"benchmarks.{name}.__main__")
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    help = capsys.readouterr().out
    assert help.startswith(f"usage: python -m benchmarks.{name} ")
    assert command.__doc__ in help
    assert re.search(r"Writes benchmarks/results/NAME\S*\.json", help.replace("\n", " "))
    assert f"(default: {name})" in help


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_lists_every_command(name: str) -> None:
    assert f"\npython -m benchmarks.{name} " in (FOLDER / "README.md").read_text()
