"""Folders of `accelerator.save_state` with two prepared models, and with the user's own hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

import swiftmoe_lightning as sml
from tests.engine import models
from tests.helpers import rank_errors, run_ranks

CONFIG = sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4)


def pair(numbers: tuple[int, int]) -> tuple[Accelerator, list[tuple[Any, Any]]]:
    """Two models of these numbers of experts, each prepared with its optimizer."""
    accelerator = Accelerator(cpu=True)
    prepared = []
    for number in numbers:
        torch.manual_seed(number)
        model = nn.Sequential(nn.Linear(6, 6), sml.MoE(6, 8, number, 2)).double()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        prepared.append(sml.accelerate.prepare(accelerator, model, optimizer, config=CONFIG))
    return accelerator, prepared


def losses(accelerator: Accelerator, prepared: list[tuple[Any, Any]], steps: range) -> list[float]:
    actual = []
    for step in steps:
        x = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        x = models.my_part(x, accelerator.process_index, accelerator.num_processes)
        for model, optimizer in prepared:
            loss = F.mse_loss(model(x), x.roll(1, 1))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            actual.append(float(loss.detach()))
    return actual


def resume(folder: str, numbers: tuple[int, int]) -> tuple[list[float], list[float], bool]:
    accelerator, prepared = pair(numbers)
    losses(accelerator, prepared, range(2))
    accelerator.save_state(folder)
    saved = [dict(model.engine.placements) for model, _ in prepared]
    first = losses(accelerator, prepared, range(2, 4))
    accelerator.load_state(folder)
    loaded = [dict(model.engine.placements) for model, _ in prepared]
    same = all(
        (a[name].slot_to_expert_S == b[name].slot_to_expert_S).all()
        for a, b in zip(saved, loaded, strict=True)
        for name in a
    )
    return first, losses(accelerator, prepared, range(2, 4)), same


@pytest.mark.parametrize("numbers", [(5, 7), (5, 5)])
def test_two_models_go_on_from_one_folder(numbers: tuple[int, int], tmp_path: Path) -> None:
    for first, again, same in run_ranks(resume, 2, str(tmp_path), numbers, init=False):
        assert again == pytest.approx(first, rel=1e-9)
        assert same
    assert {path.name for path in tmp_path.glob("swiftmoe*")} == {"swiftmoe.pt", "swiftmoe_1.pt"}


def take_out(accelerator: Accelerator, num_models: int) -> None:
    """Hooks as diffusers' scripts register them: models are written in a form of the user's own."""

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        for index in range(num_models):
            weight = weights.pop()
            if accelerator.is_main_process:
                torch.save(weight, Path(folder, f"mine{index}.pt"))

    def load(models: list[nn.Module], folder: str) -> None:
        for index in range(num_models):
            models.pop().load_state_dict(torch.load(Path(folder, f"mine{index}.pt"), weights_only=True))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def resume_with_hooks(folder: str, num_models: int = 2) -> tuple[list[float], list[float]]:
    accelerator, prepared = pair((5, 7))
    take_out(accelerator, num_models)
    losses(accelerator, prepared, range(2))
    accelerator.save_state(folder)
    first = losses(accelerator, prepared, range(2, 4))
    accelerator.load_state(folder)
    return first, losses(accelerator, prepared, range(2, 4))


def test_hooks_that_take_the_weights_out_give_them_back(tmp_path: Path) -> None:
    for first, again in run_ranks(resume_with_hooks, 2, str(tmp_path), init=False):
        assert again == pytest.approx(first, rel=1e-9)
    assert not list(tmp_path.glob("model*"))


def test_hooks_that_take_half_of_the_weights_are_refused(tmp_path: Path) -> None:
    for error in rank_errors(resume_with_hooks, 2, str(tmp_path), 1, init=False):
        assert "holds the weights of 1 models (model.safetensors), and 2 were prepared. Let your hooks take" in error


def load_without_weights(folder: str) -> None:
    accelerator, _ = pair((5, 7))
    accelerator.load_state(folder)


def test_a_folder_without_weights_says_which_file_it_lacks(tmp_path: Path) -> None:
    for error in rank_errors(load_without_weights, 2, str(tmp_path), init=False):
        assert "pytorch_model.bin" in error
