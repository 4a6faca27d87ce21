"""A small LightningModule with MoE blocks, and fits of it on ranks and on one process over the same global batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import swiftmoe_lightning as sml
from tests.helpers import run_ranks

DIM, GLOBAL_BATCH, NUM_BATCHES = 12, 24, 4


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """[DIM] inputs and targets, fixed; some inputs repeat, so that experts are unevenly popular."""

    def __init__(self, size: int = GLOBAL_BATCH * NUM_BATCHES) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(size, DIM, generator=generator)
        self.x[::3] = self.x[0] + 0.1 * self.x[::3]
        self.y = torch.randn(size, DIM, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


class Model(L.LightningModule):
    """Linear, residual MoE of 5 experts, linear; AdamW."""

    def __init__(self, **moe_options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(DIM, DIM)
        self.moe = sml.MoE(DIM, 10, 5, 2, **moe_options)
        self.outer = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return self.outer(hidden + self.moe(hidden))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self(x), y) + sml.auxiliary_loss(self)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(world_size: int, size: int = GLOBAL_BATCH * NUM_BATCHES) -> DataLoader[tuple[Tensor, Tensor]]:
    """Batches of which W ranks together hold GLOBAL_BATCH, the same ones for any W."""
    indices = range(int(os.environ["RANK"]), size, world_size)
    return DataLoader(Noise(size), batch_size=GLOBAL_BATCH // world_size, sampler=indices)


def trainer(world_size: int, strategy: Any = "swiftmoe", **options: Any) -> L.Trainer:
    """A quiet CPU Trainer; on one process without our strategy."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
        "use_distributed_sampler": False,
    }
    return L.Trainer(accelerator="cpu", devices=world_size, strategy=strategy, **{**quiet, **options})


def whole(module: nn.Module) -> dict[str, Tensor]:
    """The module's state with every expert gathered. A collective."""
    state = {}
    for name, value in module.state_dict().items():
        state[name] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
    return state


def fit(world_size: int, strategy: Any, make: Callable[[], Model], options: dict[str, Any]) -> dict[str, Tensor]:
    """What a fit leaves in the module."""
    model = make()
    trainer(world_size, strategy, **options).fit(model, loader(world_size), loader(world_size, GLOBAL_BATCH))
    return whole(model)


def assert_same_fit(
    make: Callable[[], Model], tolerance: float = 1e-5, world_size: int = 2, alone: str = "auto", **options: Any
) -> None:
    """`world_size` ranks under swiftmoe end where one process under `alone` ends, parameter by parameter."""
    (expected,) = run_ranks(fit, 1, 1, alone, make, options, init=False)
    for state in run_ranks(fit, world_size, world_size, "swiftmoe", make, options, init=False):
        assert_close(state, expected, tolerance)


def assert_close(state: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Same names, and values whose error is at most `tolerance` in norm, relative to the expected."""
    assert state.keys() == expected.keys()
    errors = {name: float((state[name] - e).norm() / e.norm().clamp(min=1e-12)) for name, e in expected.items()}
    assert max(errors.values()) <= tolerance, errors
