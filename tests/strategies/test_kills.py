"""Runs that are killed at any moment, also while they save, go on from their last checkpoint as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import swiftmoe_lightning as sml
from tests.helpers import run_ranks, start_ranks
from tests.strategies.cases import GLOBAL_BATCH, Model, assert_close, loader, trainer, whole

NUM_STEPS, TIMEOUT_S = 60, 60


class Slow(Model):
    """Steps long enough to be killed between saves, too."""

    def on_train_batch_end(self, *_: Any) -> None:
        time.sleep(0.02)


def train(folder: str, directory: bool) -> dict[str, Tensor]:
    """A run of 60 steps that saves after every fourth, from its last checkpoint if there is one."""
    model = Slow()
    saving = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    strategy = sml.SwiftMoEStrategy(save_distributed_checkpoint=directory)
    made = trainer(2, strategy, callbacks=[saving], enable_checkpointing=True, max_epochs=NUM_STEPS // 4)
    made.fit(model, loader(2), loader(2, GLOBAL_BATCH), ckpt_path="last" if any(Path(folder).glob("last*")) else None)
    assert made.global_step == NUM_STEPS
    return whole(model)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    found: dict[str, Tensor] = run_ranks(train, 2, str(tmp_path_factory.mktemp("whole")), False, init=False)[0]
    return found


@pytest.mark.parametrize("directory", [False, True])
def test_killed_runs_resume_from_a_whole_checkpoint(
    directory: bool, uninterrupted: dict[str, Tensor], tmp_path: Path
) -> None:
    moments = random.Random(int(directory))
    for _ in range(3):
        with start_ranks(train, 2, str(tmp_path / "run"), directory, init=False, timeout_s=TIMEOUT_S) as ranks:
            _wait_for(lambda: any((tmp_path / "run").glob("last*")))
            time.sleep(moments.uniform(0, 0.8))
            for process in ranks:
                os.kill(process.pid, signal.SIGKILL)
    for state in run_ranks(train, 2, str(tmp_path / "run"), directory, init=False):
        assert_close(state, uninterrupted)


def test_a_rank_whose_neighbour_is_killed_ends_with_an_error(tmp_path: Path) -> None:
    with start_ranks(train, 2, str(tmp_path / "run"), False, init=False, timeout_s=TIMEOUT_S) as ranks:
        _wait_for(lambda: any((tmp_path / "run").glob("last*")))
        os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[0].join(TIMEOUT_S)
        assert ranks[0].exitcode is not None, "the surviving rank hangs"


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "the run has saved nothing"
        time.sleep(0.01)
