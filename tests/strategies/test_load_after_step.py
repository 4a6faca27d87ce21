"""A load right after a step, while the updated weights are under way for another placement, goes on from the file."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.fabric import Fabric
from lightning.pytorch.tuner import Tuner
from torch import nn

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import run_ranks
from tests.strategies import cases


def train(model: nn.Module, optimizer: Any, backward: Callable[..., None], rank: int, steps: range) -> list[float]:
    """Each step's loss on this rank; ends right after the last step."""
    losses = []
    for step in steps:
        x, target = (models.my_part(t, rank, 2) for t in dense.batch(step, 0, torch.float64))
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        backward(loss)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def under_accelerate(folder: str) -> tuple[list[float], list[float]]:
    accelerator = Accelerator(cpu=True)
    model: Any = models.build(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4)
    model, optimizer = sml.accelerate.prepare(accelerator, model, optimizer, config=config)
    loop = partial(train, model, optimizer, accelerator.backward, accelerator.process_index)
    loop(range(2))
    accelerator.save_state(folder)
    first = loop(range(2, 5))
    accelerator.load_state(folder)
    return first, loop(range(2, 5))


def under_fabric(folder: str) -> tuple[list[float], list[float]]:
    ours = sml.SwiftMoEFabricStrategy(placement=models.RandomPolicy, slots_per_rank=4)
    fabric = Fabric(accelerator="cpu", strategy=ours, devices=2)
    fabric.launch()
    model: Any = models.build(torch.float64)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    loop = partial(train, model, optimizer, fabric.backward, fabric.global_rank)
    loop(range(2))
    fabric.save(f"{folder}/saved.ckpt", {"model": model, "optimizer": optimizer})
    first = loop(range(2, 5))
    fabric.load(f"{folder}/saved.ckpt", {"model": model, "optimizer": optimizer})
    return first, loop(range(2, 5))


@pytest.mark.parametrize("run", [under_accelerate, under_fabric])
def test_a_load_goes_on_where_the_file_was_saved(run: Callable[[str], Any], tmp_path: Path) -> None:
    for first, again in run_ranks(run, 2, str(tmp_path), init=False):
        assert again == pytest.approx(first, rel=1e-9)


class Tuned(cases.Model):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 1e-2

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def find_rate(folder: str, world_size: int) -> tuple[list[float], Any]:
    model = Tuned()
    strategy: Any = "auto"
    if world_size > 1:
        strategy = sml.SwiftMoEStrategy(placement=models.RandomPolicy, slots_per_rank=4)
    trainer = cases.trainer(world_size, strategy, default_root_dir=folder, enable_checkpointing=True)
    finder = Tuner(trainer).lr_find(
        model,
        cases.loader(world_size),
        cases.loader(world_size, cases.GLOBAL_BATCH),
        num_training=4,
        early_stop_threshold=None,
        update_attr=False,
    )
    assert finder is not None
    return finder.results["loss"], cases.whole(model)


def test_lr_find_ends_with_the_weights_that_it_began_with(tmp_path: Path) -> None:
    (expected,) = run_ranks(find_rate, 1, str(tmp_path), 1, init=False)
    for _, state in run_ranks(find_rate, 2, str(tmp_path), 2, init=False):
        cases.assert_close(state, expected[1], 0.0)
        cases.assert_close(state, Tuned().state_dict(), 0.0)
