"""The launch check of `swiftmoe doctor` on real processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from swiftmoe_lightning.distributed import launch_check
from swiftmoe_lightning.doctor import print_launch
from tests.helpers import free_port, run_ranks, script_environment


def checked(
    timeout_s: float, absent: int = -1, broken: bool = False
) -> tuple[list[int], dict[str, float], list[Any], str]:
    """What one rank finds, and what it would print."""
    if int(os.environ["RANK"]) == absent:
        return [], {}, [], ""
    if broken:
        # As where a firewall lets ranks meet, but not exchange.
        patched: Any = patch.object(launch_check, "measure_speed", side_effect=RuntimeError("Connection refused\nat x"))
    else:
        patched = contextlib.nullcontext()
    with patched, launch_check.check_launch(timeout_s) as report, contextlib.redirect_stdout(io.StringIO()) as printed:
        print_launch(report, as_json=False)
    findings = [(finding.is_problem, finding.what) for finding in report.findings]
    return [facts.rank for facts in report.ranks], report.speeds, findings, printed.getvalue()


def test_ranks_that_fit_together_measure_their_links_alike() -> None:
    first, second = run_ranks(checked, 2, 30.0, init=False)
    assert first == second
    ranks, speeds, findings, printed = first
    assert (ranks, list(speeds), findings) == ([0, 1], ["inside"], [])
    assert speeds["inside"] > 0
    assert "GB/s inside its host." in printed
    assert "No problem found: 2 of 2 ranks came, and fit together." in printed


def test_a_rank_that_does_not_come_is_named_and_nobody_waits_longer_than_told() -> None:
    start = time.monotonic()
    first, second, _ = run_ranks(checked, 3, 2.0, 2, init=False)
    assert time.monotonic() - start < 30
    assert first == second
    ranks, speeds, findings, printed = first
    assert (ranks, speeds) == ([0, 1], {})
    assert findings == [(True, "Rank 2 of 3 did not come; ranks 0-1 did.")]
    assert "Problem: Rank 2 of 3 did not come; ranks 0-1 did.\n  Fix: Start the missing processes." in printed


def test_ranks_that_meet_but_cannot_exchange_are_a_problem() -> None:
    for _, speeds, findings, _ in run_ranks(checked, 2, 20.0, -1, True, init=False):
        assert speeds == {}
        whats = [
            f"Rank {rank} could not exchange bytes with the others over gloo: Connection refused." for rank in (0, 1)
        ]
        assert findings == [(True, what) for what in whats]


def without_rank_0() -> str:
    with pytest.raises(ConnectionError) as caught, launch_check.check_launch(1.0):
        pass
    return str(caught.value)


def test_without_rank_0_the_others_say_whom_they_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    message = without_rank_0()
    assert message.startswith("rank 1 on ")
    assert f"got no connection to MASTER_ADDR:MASTER_PORT, 127.0.0.1:{port}, within 1 s" in message
    assert "Start rank 0 on that host" in message


def test_under_torchrun_the_command_checks_the_launch_of_itself(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "swiftmoe_lightning", "doctor", "--timeout", "60", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=script_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    # One rank tells of both.
    actual = json.loads(done.stdout)
    assert [facts["local_rank"] for facts in actual["ranks"]] == [0, 1]
    assert actual["ranks"][0]["versions"]["torch"]
    assert actual["findings"] == []
