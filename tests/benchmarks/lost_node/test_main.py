"""The lost_node benchmark: its saves on tiny layers; what it makes of a run's moments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lost_node import __main__ as command

MOMENTS = """\
started 0 1.0
4 11 10.0
4 12 10.5
killed 13 11.0
started 0 13.0
2 12 15.0
2 13 15.5
"""


def test_saves_are_measured_and_lost_steps_counted(
    result: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Runs of the example are in tests/engine/test_memory_checkpoint.py.
    monkeypatch.setattr(command, "run_script", lambda *words, **_: Path(words[2].split("'")[-2]).write_text(MOMENTS))
    sizes = {"layers": 1, "dim": 8, "hidden-dim": 8, "experts": 4, "pairs": 1, "losses": 1}
    command.main(["--name", "tiny", *(f"--{name}={value}" for name, value in sizes.items())])
    written = result("tiny")
    assert written["go_on"] == [{"steps_lost": 1, "restart_s": 2.0, "next_step_s": 4.0}]
    assert written["saves"]["held_up_s"]["count"] == written["saves"]["load_s"]["count"] == 2
    assert written["saves"]["whole_s"]["median"] > written["saves"]["held_up_s"]["median"]
    assert "1 trained steps lost, started again after 2.0 s, next step after 4.0 s" in capsys.readouterr().out
