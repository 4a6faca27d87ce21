"""The kills benchmark's sums, of runs that are not started; tests/strategies/test_killed_runs.py kills real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.kills import __main__ as command
from tests.strategies.killed_run import Death


def test_kills_and_losses_are_summed_up(
    result: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deaths = iter([Death(True, True, 0.5, 0), Death(False, False, 0.0, 0), Death(True, False, 1.5, 0)] * 2)
    monkeypatch.setattr(command, "run_ranks", lambda *_, **__: [None, None])
    monkeypatch.setattr(command, "run_and_kill", lambda *_: next(deaths))
    monkeypatch.setattr(command, "num_lost_steps", lambda folder: 0)
    monkeypatch.setattr(
        command, "losses", lambda folder: [(1, 2.0), (2, 1.0), *([] if "whole" in folder.name else [(2, 1.5)])]
    )
    command.main(["--name", "tiny", "--kills", "4"])
    written = result("tiny")
    assert written.keys() == {"certificate", "file", "directory"}
    for kind in ("file", "directory"):
        # A run that ended before it was killed is no kill, and a new one begins.
        assert [kill["outlived_s"] for kill in written[kind]["kills"]] == [0.5, 1.5]
        assert len(written[kind]["runs"]) == 2
        assert written[kind]["runs"][0] == {
            "steps_trained": 3,
            "steps_missing": 0,
            "steps_lost": 0,
            "largest_loss_error": 0.5,
        }
    assert "file              2" in capsys.readouterr().out


def test_each_kind_of_checkpoint_needs_a_kill(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--kills", "1"])
    assert "--kills must be 2 or more, one for each kind of checkpoint, got 1" in capsys.readouterr().err
