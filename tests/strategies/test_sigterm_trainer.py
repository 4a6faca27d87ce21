"""Lightning runs that a signal stops: all ranks save after the same batch, and go on as if they had not stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch.utils.data import DataLoader, IterableDataset

from tests.helpers import nightly, rank_errors, run_ranks, script_environment
from tests.strategies.sigterm_runs import (
    ROOT,
    Signal,
    assert_same_losses,
    losses,
    train,
    train_until_signal,
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("uninterrupted"))
    run_ranks(train, 1, folder, init=False)
    return folder


def step_of(path: Path) -> int:
    step: int = torch.load(path, weights_only=True)["global_step"]
    return step


@pytest.mark.parametrize(("batch", "last"), [(1, 1), *nightly((5, 5)), (8, 9), *nightly((11, 11)), (30, 30)])
def test_all_ranks_save_after_the_batch_in_which_one_got_sigterm(
    batch: int, last: int, uninterrupted: str, tmp_path: Path
) -> None:
    """Batch 5 is saved anyway, and batch 30 the last of all. After the last of an epoch, 8, one more is trained."""
    folder = str(tmp_path)
    for error in rank_errors(train_until_signal, 2, folder, batch, init=False):
        assert "SIGTERMException" in error
    assert step_of(tmp_path / "last.ckpt") == last == len(losses(folder))
    run_ranks(train, 2, folder, init=False)
    assert_same_losses(folder, uninterrupted)


ACCUMULATED = {"accumulate_grad_batches": 3}


def accumulate(folder: str) -> None:
    train(folder, num_steps=9, **ACCUMULATED)


def test_a_stop_waits_for_the_optimizer_step_of_what_is_accumulated(tmp_path: Path) -> None:
    stopped, whole = str(tmp_path / "stopped"), str(tmp_path / "whole")
    rank_errors(train_until_signal, 2, stopped, 4, signal.SIGTERM, ACCUMULATED, init=False)
    assert [number for number, _ in losses(stopped)] == [1, 2, 3, 4, 5, 6]
    run_ranks(accumulate, 2, stopped, init=False)
    run_ranks(accumulate, 2, whole, init=False)
    assert_same_losses(stopped, whole)


class Batches(IterableDataset[Any]):
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(4, 16), torch.ones(4, 1))] * self.number)


def validate_unevenly(example: Any) -> None:
    class Validated(example.Model):  # type: ignore[misc]
        def validation_step(self, batch: Any, index: int) -> None:
            self.training_step(batch, index)

        def val_dataloader(self) -> Any:
            return DataLoader(Batches(3 - 2 * self.global_rank), batch_size=None)

    example.Model = Validated


def train_and_validate(folder: str, *callbacks: Callback) -> None:
    options: Any = {"val_check_interval": 3, "num_sanity_val_steps": 0, "change": validate_unevenly}
    train(folder, *callbacks, **options)


@pytest.mark.parametrize("batch", [2, 3])
def test_validation_that_follows_is_finished_by_all_ranks(batch: int, uninterrupted: str, tmp_path: Path) -> None:
    for error in rank_errors(train_and_validate, 2, str(tmp_path), Signal(batch, signal.SIGTERM), init=False):
        assert "SIGTERMException" in error
    assert step_of(tmp_path / "last.ckpt") == batch
    run_ranks(train_and_validate, 2, str(tmp_path), init=False)
    assert_same_losses(tmp_path, uninterrupted)


class Fail(Callback):
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 6:
            raise ArithmeticError("of rank 1 alone")


def train_and_fail(folder: str) -> None:
    train(folder, Fail())


def test_an_error_of_one_rank_saves_nothing_and_is_shown(tmp_path: Path) -> None:
    errors = rank_errors(train_and_fail, 2, str(tmp_path), init=False)
    assert "did not follow" in errors[0]
    assert "ArithmeticError: of rank 1 alone" in errors[1]
    assert step_of(tmp_path / "last.ckpt") == 5


@pytest.mark.parametrize("options", [{"num_steps": 8}, {"limit_train_batches": 1}], ids=str)
def test_a_stop_is_not_lost_at_the_end_of_training_and_where_every_batch_is_the_last(
    options: dict[str, Any], tmp_path: Path
) -> None:
    for error in rank_errors(train_until_signal, 2, str(tmp_path), 8, signal.SIGTERM, options, init=False):
        assert "SIGTERMException" in error
    assert step_of(tmp_path / "last.ckpt") == 8


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "Lightning": [],
}


@pytest.mark.parametrize("launcher", ["torchrun", *nightly("Lightning")])
def test_sigterm_to_the_launcher_saves(launcher: str, uninterrupted: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport lightning as L\n"
        "from tests.strategies.sigterm_runs import train\n"
        "class Slow(L.Callback):\n    def on_train_batch_end(self, *_):\n        time.sleep(0.1)\n"
        "if __name__ == '__main__':\n    train(sys.argv[1], Slow())\n"
    )
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], str(script), str(folder)],
        env=script_environment(LOCAL_WORLD_SIZE="2"),
        stderr=subprocess.DEVNULL,
    )
    try:
        while not ((folder / "losses").exists() and len(losses(folder)) > 2):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
    assert len(losses(folder)) < 30, "the signal came after the end"
    assert step_of(folder / "last.ckpt") == len(losses(folder))
    run_ranks(train, 2, str(folder), init=False)
    assert_same_losses(folder, uninterrupted)


def train_under_slurm(folder: str, batch: int) -> None:
    """One rank gets SLURM's signal to requeue."""
    rank = os.environ["RANK"]
    task = {"PROCID": rank, "LOCALID": rank, "NODEID": "0", "NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_ID": "123"}
    os.environ |= {f"SLURM_{name}": value for name, value in task.items()} | {"SLURM_JOB_NAME": "train"}
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
    requeued: Any = {"plugins": [SLURMEnvironment()], "default_root_dir": folder}
    train(folder, Signal(batch, signal.SIGUSR1), **requeued)


def test_slurm_requeues_after_all_ranks_have_saved(uninterrupted: str, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o700)
    for error in rank_errors(train_under_slurm, 2, str(tmp_path), 6, init=False):
        assert "SIGTERMException" in error
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    assert step_of(tmp_path / "last.ckpt") == step_of(tmp_path / "hpc_ckpt_1.ckpt") == 6
    shutil.move(tmp_path / "hpc_ckpt_1.ckpt", tmp_path / "last.ckpt")
    run_ranks(train, 2, str(tmp_path), init=False)
    assert_same_losses(tmp_path, uninterrupted)
