"""Ctrl-C in the demo, and what a run leaves of an earlier one in its folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.demo.test_run import TINY, arguments
from tests.helpers import script_environment

TEXT = "The quick brown fox jumps over the lazy dog; what it thinks of it nobody knows.\n" * 20


def processes_of(group: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(process_group) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_ctrl_c_ends_all_ranks_with_a_line_and_leaves_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    folder = tmp_path / "run"
    folder.mkdir()
    old = ["placements.npz", "picture.png", "metrics.csv", "hparams.yaml"]
    for name in [*old, "notes.txt"]:
        (folder / name).write_text("old")
    options = arguments(**TINY | {"steps": 100_000}, ranks=2, data="text.txt", out="run")
    run = subprocess.Popen(
        [sys.executable, "-m", "swiftmoe_lightning", "train", *options],
        cwd=tmp_path,
        env=script_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        # Its metrics are written anew once some steps are done.
        deadline = time.monotonic() + 100
        while not ((folder / "metrics.csv").exists() and "old" not in (folder / "metrics.csv").read_text()):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        # As a terminal does: to all ranks at once.
        os.killpg(run.pid, signal.SIGINT)
        out, err = run.communicate(timeout=60)
        assert run.returncode == 130, (out, err)
        assert processes_of(run.pid) == []
    finally:
        run.kill()
    assert "Traceback" not in out + err
    assert "Warning" not in err
    last = out.strip().splitlines()[-1]
    assert last.startswith("Stopped after ")
    assert last.endswith(" of 100000 steps. What was recorded is in run/.")
    with np.load(folder / "placements.npz") as recorded:
        # The signal may come between a step and its recording.
        assert int(last.split()[2]) - len(recorded["step"]) in (0, 1)
    # A picture is drawn at the end only, and what is not the demo's stays.
    kept = {path.name: path.read_bytes() == b"old" for path in folder.iterdir()}
    assert kept == {"hparams.yaml": False, "metrics.csv": False, "notes.txt": True, "placements.npz": False}
