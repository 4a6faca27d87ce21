"""Converted Hugging Face models on W ranks train like the originals in one process, and save ordinary checkpoints.

Losses, auxiliary ones included, are the mean of the losses of the ranks' parts of the batch, in the reference too: the
auxiliary loss of transformers is not linear in the batch, and DDP takes the mean of the ranks' gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swiftmoe_lightning as sml
from tests import hf_models
from tests.engine.models import RandomPolicy, my_part
from tests.helpers import run_ranks

pytest.importorskip("transformers")

STEPS = 10
# Plain, shared experts, biases with transposed and interleaved weights, repeated tokens; no gates.
ADAMW = ["mixtral", "qwen2_moe", "gpt_oss", "llama4_text"]
SGD = ["deepseek_v3", "nemotron_h"]


def optimizer_of(family: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if family in SGD:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def train_ranks(families: list[str], folder: str, checkpointing: bool) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Train each family, spread, and save it. Returns the number of placements each went through, and its losses.

    checkpointing: forget activations and compute them anew, as `activation_checkpointing_enable()` sets it up.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    num_placements, losses = {}, {}
    for family in families:
        # Only rank 0's values may count.
        model = sml.convert(hf_models.build(family, seed=rank))
        if checkpointing:
            # transformers 5.17 knows it by its older name alone.
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(slots_per_rank=4, placement=RandomPolicy))
        wrapped = engine.data_parallel()
        optimizer = engine.prepare_optimizer(optimizer_of(family, model))
        seen, losses[family] = set(), []
        for step in range(STEPS):
            seen.add(next(iter(engine.placements.values())))
            ids = my_part(hf_models.tokens(step), rank, world_size)
            loss = wrapped(input_ids=ids, labels=ids).loss
            loss.backward()
            engine.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses[family].append(float(loss.detach()))
        num_placements[family] = len(seen)
        state = engine.full_state_dict()
        if rank == 0:
            model.save_pretrained(Path(folder, family), state_dict=state)
    return num_placements, losses


def train_alone(family: str, world_size: int) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The same in one process, without this package. Returns the weights, and the losses of each rank's parts."""
    model = hf_models.build(family)
    optimizer = optimizer_of(family, model)
    losses: list[list[float]] = [[] for _ in range(world_size)]
    for step in range(STEPS):
        for rank in range(world_size):
            ids = my_part(hf_models.tokens(step), rank, world_size)
            loss = model(input_ids=ids, labels=ids).loss
            (loss / world_size).backward()
            losses[rank].append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), losses


@pytest.mark.parametrize(
    ("world_size", "families", "checkpointing"), [(2, ADAMW + SGD, False), (4, ["mixtral", "gpt_oss"], True)]
)
def test_ten_steps_on_ranks_equal_ten_steps_of_the_original_alone(
    world_size: int, families: list[str], checkpointing: bool, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    outcomes: list[Any] = run_ranks(train_ranks, world_size, families, str(tmp_path), checkpointing, timeout_s=120)
    for family in families:
        expected, expected_losses = train_alone(family, world_size)
        for (num_placements, losses), alone in zip(outcomes, expected_losses, strict=True):
            assert num_placements[family] > STEPS // 2
            assert losses[family] == pytest.approx(alone, rel=1e-4)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family).state_dict()
        start = hf_models.build(family).state_dict()
        assert list(loaded) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(
                loaded[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name, f=family: f"{f} {n}: {m}"
            )
            assert "experts" not in name or not torch.allclose(value, start[name], rtol=1e-3, atol=1e-3)
