"""The GPU benchmark's command where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import peers
from benchmarks.gpu.check import checks


@pytest.mark.nightly
def test_without_a_gpu_it_checks_and_says_that_it_times_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = [check for check in checks(tiny=True) if check.routing == "drops" or not check.tiles]
    monkeypatch.setattr(command, "checks", lambda tiny: few if tiny else None)
    assert command.main([]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("No GPU: kernels run under Triton's interpreter")
    assert second == f"correctness: {len(few)} of {len(few)} checks passed"


def test_what_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(command, "checks", lambda tiny: checks(tiny)[-1:])
    monkeypatch.setattr("benchmarks.gpu.check.ours_grouped", lambda *inputs: peers.eager_loop(*inputs) * 1.02)
    assert command.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--shapes", "B,X"])
    assert "--shapes must be some of B, Q, S, C, A, D, C2, B512, got X" in capsys.readouterr().err
