"""A run whose ranks are killed (SIGKILL) at chosen moments, and the losses and saves that it recorded."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import swiftmoe_lightning as sml
from tests.helpers import start_ranks
from tests.strategies.cases import GLOBAL_BATCH, NUM_BATCHES, Model, loader, trainer, whole
from tests.strategies.sigterm_runs import Record

NUM_STEPS, TIMEOUT_S = 60, 60
STEP_S, START_S = 0.02, 0.2
WHERE = ("starting", "training", "saving")


@dataclass(frozen=True)
class Kill:
    """When a process dies: `share` (0 to 1) of the way through its first steps, a training batch, or a save.

    rank: None kills all of them. number: which batch or save after the start, from 0.
    """

    rank: int | None
    where: str
    number: int
    share: float


def draw(moments: random.Random) -> Kill:
    """A kill at a random moment, most of them in training and in saves."""
    (where,) = moments.choices(WHERE, (1, 2, 2))
    return Kill(moments.choice([None, 0, 1]), where, moments.randrange(6), moments.random())


class Killer(L.Callback):
    """Kills its own process at a moment, by a timer, so that it can come anywhere; records the saves."""

    def __init__(self, folder: str, kill: Kill | None) -> None:
        self.folder, self.kill = Path(folder), kill
        self.num_batches, self.save_times = 0, [0.01]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.trainer, self.save = trainer, trainer.strategy.save_checkpoint
        trainer.strategy.save_checkpoint = self.save_checkpoint  # type: ignore[method-assign]
        self.at("starting", 0, START_S)

    def on_train_start(self, *_: Any) -> None:
        self.note("start")

    def on_train_batch_start(self, *_: Any) -> None:
        self.at("training", self.num_batches, STEP_S)
        self.num_batches += 1

    def on_train_batch_end(self, *_: Any) -> None:
        # Steps long enough to be killed between saves, too.
        time.sleep(STEP_S)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, **options: Any) -> None:
        self.note("begin")
        self.at("saving", len(self.save_times) - 1, self.save_times[-1])
        start = time.perf_counter()
        self.save(checkpoint, filepath, **options)
        self.save_times.append(time.perf_counter() - start)
        self.note("last" if Path(filepath).name.startswith("last") else "other")

    def at(self, where: str, number: int, lasts_s: float) -> None:
        """Set the timer if the process is to die here."""
        kill = self.kill
        is_due = kill is not None and kill.where == where and (where == "starting" or kill.number == number)
        if kill is not None and is_due and kill.rank in (None, self.trainer.global_rank):
            threading.Timer(kill.share * lasts_s, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def note(self, name: str) -> None:
        if self.trainer.is_global_zero:
            with (self.folder / "books").open("a") as file:
                file.write(f"{name} {self.trainer.global_step}\n")


def train(folder: str, directory: bool, kill: Kill | None = None) -> dict[str, Tensor]:
    """60 steps in float64, saved after every fourth, from the last checkpoint if there is one."""
    torch.set_default_dtype(torch.float64)
    Path(folder).mkdir(exist_ok=True)
    warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")
    model = Model()
    saving = ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True)
    strategy = sml.SwiftMoEStrategy(save_distributed_checkpoint=directory)
    callbacks = [saving, Killer(folder, kill), Record(folder)]
    made = trainer(2, strategy, callbacks=callbacks, enable_checkpointing=True, max_epochs=NUM_STEPS // NUM_BATCHES)
    made.fit(model, loader(2), loader(2, GLOBAL_BATCH), ckpt_path="last")
    assert made.global_step == NUM_STEPS
    return whole(model)


def books(folder: str | Path) -> list[tuple[str, int]]:
    """What rank 0 did, and at which step: "start"; "begin" of a save, and that the "last" or an "other" was saved."""
    path = Path(folder, "books")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name, int(step)) for name, step in map(str.split, lines)]


def num_lost_steps(folder: str | Path) -> int:
    """The most steps that a start was behind a "last" checkpoint that had been saved."""
    saved = lost = 0
    for name, step in books(folder):
        if name == "last":
            saved = step
        elif name == "start":
            lost = max(lost, saved - step)
    return lost


@dataclass(frozen=True)
class Death:
    """What a kill did.

    killed: False where the run ended first. in_save: a save was under way, and was not finished. outlived_s: how long a
    rank that was not killed lived on. hung: ranks that were still there after a minute.
    """

    killed: bool
    in_save: bool
    outlived_s: float
    hung: int


def run_and_kill(folder: str, directory: bool, kill: Kill) -> Death:
    """Start or resume the run on two ranks, one or both of which die."""
    num_before = len(books(folder))
    with start_ranks(train, 2, folder, directory, kill, init=False, timeout_s=TIMEOUT_S) as ranks:
        died_at = None
        started_at = time.monotonic()
        while any(rank.is_alive() for rank in ranks) and time.monotonic() < (died_at or started_at) + TIMEOUT_S:
            time.sleep(0.01)
            if died_at is None and any(rank.exitcode == -signal.SIGKILL for rank in ranks):
                died_at = time.monotonic()
        outlived_s = 0.0 if died_at is None else time.monotonic() - died_at
        hung = sum(rank.is_alive() for rank in ranks)
    in_save = died_at is not None and [name for name, _ in books(folder)[num_before:]][-1:] == ["begin"]
    return Death(died_at is not None, in_save, outlived_s, hung)
