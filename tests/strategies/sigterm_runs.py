"""Runs that stop and go on: the example's training and the docs' blocks, with every batch's loss recorded."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "stopping-and-resuming.md").read_text(), flags=re.DOTALL)
NUM_STEPS = 30


def load_example() -> Any:
    """examples/resume_by_itself.py as a module."""
    spec = importlib.util.spec_from_file_location("resume_by_itself", ROOT / "examples" / "resume_by_itself.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Record(L.Callback):
    """Writes a line into `folder`/losses after every batch: its number, and its loss over all ranks."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder, "losses")

    def on_train_batch_end(self, trainer: L.Trainer, _: Any, outputs: Any, *__: Any) -> None:
        loss = float(trainer.strategy.reduce(outputs["loss"]))
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(f"{trainer.fit_loop.total_batch_idx + 1} {loss!r}\n")


class Signal(L.Callback):
    """Rank 1 gets a signal at the start of a batch."""

    def __init__(self, batch: int, signum: int) -> None:
        self.batch, self.signum = batch, signum

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.fit_loop.total_batch_idx + 1 == self.batch:
            os.kill(os.getpid(), self.signum)


def save_at_stop(folder: str) -> L.Callback:
    """The callback in the docs."""
    names: dict[str, Any] = {"L": L}
    exec(compile(BLOCKS[0].replace("checkpoints/", f"{folder}/"), "stopping-and-resuming.md", "exec"), names)
    made: L.Callback = names["SaveAtStop"]()
    return made


def train(
    folder: str,
    *callbacks: L.Callback,
    num_steps: int = NUM_STEPS,
    change: Callable[[Any], None] | None = None,
    **options: Any,
) -> None:
    """The example's training in float64, from the newest checkpoint in the folder.

    change: is given the example as a module, to change what it trains.
    """
    Path(folder).mkdir(exist_ok=True)
    warnings.filterwarnings("ignore", message=".*there is no last checkpoint available.*")
    # Lightning's precision="64-true" would load weights through float32.
    torch.set_default_dtype(torch.float64)
    example = load_example()
    if change is not None:
        change(example)
    example.train(folder, [Record(folder), save_at_stop(folder), *callbacks], max_steps=num_steps, **options)


def train_until_signal(folder: str, batch: int, signum: int = signal.SIGTERM, options: Any = None) -> None:
    train(folder, Signal(batch, signum), **(options or {}))


def losses(folder: str | Path) -> list[tuple[int, float]]:
    """(batch, loss) as they were written down: what was trained twice is there twice."""
    lines = Path(folder, "losses").read_text().splitlines()
    return [(int(number), float(loss)) for number, loss in map(str.split, lines)]


def assert_same_losses(folder: str | Path, uninterrupted: str | Path) -> None:
    """Every batch was trained, and each time with the loss of the uninterrupted run."""
    expected, actual = dict(losses(uninterrupted)), losses(folder)
    assert {number for number, _ in actual} == expected.keys()
    assert all(abs(loss - expected[number]) <= 1e-9 for number, loss in actual), (actual, expected)
