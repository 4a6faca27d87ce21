"""Ranks that a running process starts for a function: by Accelerate's launchers, and by torch for the plain engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, debug_launcher, notebook_launcher
from torch import Tensor, nn

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import free_port, from_one_process, nightly
from tests.strategies.cases import assert_close


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world_size: int) -> None:
    """Six steps, each on this rank's part of the global batch."""
    for step in range(6):
        x, target = (models.my_part(t, rank, world_size) for t in dense.batch(step, 0, torch.float64))
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def train_with_accelerate(path: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = models.build(torch.float64)
    model, optimizer = sml.accelerate.prepare(accelerator, model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    train(model, optimizer, accelerator.process_index, accelerator.num_processes)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        torch.save(state, path)


def train_with_the_engine(rank: int, world_size: int, port: int, path: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    engine = sml.SwiftMoEEngine(models.build(torch.float64))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    train(model, optimizer, rank, world_size)
    state = engine.full_state_dict()
    if rank == 0:
        torch.save(state, path)


def by_notebook_launcher(path: str) -> None:
    notebook_launcher(train_with_accelerate, (path,), num_processes=2, use_port=str(free_port()))


def by_debug_launcher(path: str) -> None:
    debug_launcher(train_with_accelerate, (path,), num_processes=2)


def by_torch_spawn(path: str) -> None:
    torch.multiprocessing.spawn(train_with_the_engine, (2, free_port(), path), nprocs=2)


def by_torch_fork(path: str) -> None:
    torch.multiprocessing.start_processes(train_with_the_engine, (2, free_port(), path), nprocs=2, start_method="fork")


def trained_alone() -> dict[str, Tensor]:
    model = models.build(torch.float64)
    train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 0, 1)
    return model.state_dict()


@pytest.mark.parametrize("launch", [by_notebook_launcher, by_debug_launcher, *nightly(by_torch_spawn), by_torch_fork])
def test_a_launched_function_trains_as_one_process(launch: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    from_one_process(launch, str(path))
    assert_close(torch.load(path, weights_only=True), trained_alone(), 1e-12)
