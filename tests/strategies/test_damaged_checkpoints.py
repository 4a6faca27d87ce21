"""A checkpoint of any framework that was damaged on disk is an error on every rank, naming file and record."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric import Fabric

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.checkpoint_verification import verify_checkpoint
from tests.accelerate.test_prepare import Loop
from tests.engine import models
from tests.helpers import rank_errors, run_ranks
from tests.strategies.cases import Model, loader, trainer


def fit(path: str, strategy: str, directory: bool = False) -> None:
    """Save after an epoch, or go on from what is there."""
    made: Any = sml.SwiftMoEStrategy(save_distributed_checkpoint=True) if directory else strategy
    start = path if Path(path).exists() else None
    runner = trainer(2, made, max_epochs=2 if start else 1)
    runner.fit(Model(), loader(2), loader(2), ckpt_path=start)
    if start is None:
        runner.save_checkpoint(path)


def run_fabric(path: str, strategy: str) -> None:
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=2)
    fabric.launch()
    model = fabric.setup(models.build())
    if Path(path).exists():
        fabric.load(path, {"model": model})
    else:
        fabric.save(path, {"model": model})


def train_hf(folder: str) -> None:
    from tests.huggingface.test_trainer import trainer as make

    made = make(folder, max_steps=2, save_steps=2, save_strategy="steps")
    made.train(resume_from_checkpoint=f"{folder}/checkpoint-2" if Path(folder, "checkpoint-2").exists() else None)


def run_accelerate(folder: str) -> None:
    saved = Path(folder).exists()
    Loop(stop=3 if saved else 2, **({"load": folder, "skip": 2} if saved else {"save": folder}))()


def flip(path: Path, part: bytes = b"data/0FB") -> None:
    """One bit of the tensor after its header, which ends in padding."""
    data = bytearray(path.read_bytes())
    position = data.index(part) + 128
    data[position - position % 64] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("save", "load", "name"),
    [
        (partial(fit, strategy="ddp"), partial(fit, strategy="swiftmoe"), ""),
        (partial(fit, strategy="", directory=True), partial(fit, strategy="swiftmoe"), "__1_0.distcp"),
        (partial(fit, strategy="", directory=True), partial(fit, strategy="swiftmoe"), "meta.pt"),
        (partial(run_fabric, strategy="ddp"), partial(run_fabric, strategy="swiftmoe"), ""),
        (run_accelerate, run_accelerate, "swiftmoe.pt"),
        (train_hf, train_hf, "checkpoint-2/swiftmoe.pt"),
    ],
)
def test_damage_is_an_error_on_every_rank(
    save: Callable[..., None], load: Callable[..., None], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    run_ranks(save, 2, str(path), init=False, timeout_s=120)
    assert not [finding for finding in verify_checkpoint(path) if finding.is_bad]
    flip(path / name if name else path)
    for error in rank_errors(load, 2, str(path), init=False, timeout_s=120):
        assert "ValueError: cannot read the checkpoint '" in error
        assert "is damaged: its record '" in error
    (bad,) = [finding for finding in verify_checkpoint(path) if finding.is_bad]
    assert bad.path == (path / name if name else path)
