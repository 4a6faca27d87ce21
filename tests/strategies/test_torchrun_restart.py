"""A run that torchrun starts again, and then goes on with fewer ranks, has the losses of one that was never stopped."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.helpers import run_ranks, run_script
from tests.strategies.sigterm_runs import ROOT, assert_same_losses, losses, train

SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from tests.strategies.sigterm_runs import load_example, train
train(sys.argv[1], load_example().DieOnce(), num_steps=23)
"""


def go_on(folder: str, num_steps: int) -> None:
    train(folder, num_steps=num_steps)


def test_torchrun_starts_ranks_again_and_their_losses_go_on(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    command = [sys.executable, *torchrun, str(tmp_path / "script.py"), str(tmp_path / "run")]
    run_script(*command, cwd=tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    numbers = [number for number, _ in losses(tmp_path / "run")]
    # Killed after step 18, saved after step 15.
    assert (numbers.count(15), numbers.count(16)) == (1, 2)
    run_ranks(go_on, 2, str(tmp_path / "run"), 26, init=False)
    run_ranks(go_on, 1, str(tmp_path / "run"), 30, init=False)
    run_ranks(go_on, 1, str(tmp_path / "uninterrupted"), 30, init=False)
    assert_same_losses(tmp_path / "run", tmp_path / "uninterrupted")
