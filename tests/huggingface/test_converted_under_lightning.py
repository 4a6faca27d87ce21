"""A Hugging Face model, converted, in a LightningModule."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import swiftmoe_lightning as sml
from tests import hf_models
from tests.engine.models import RandomPolicy
from tests.helpers import run_ranks
from tests.strategies import cases

pytest.importorskip("transformers")

STEPS, SEQUENCES = 10, 4


class LanguageModel(L.LightningModule):
    """As the README has it."""

    def __init__(self, convert: bool) -> None:
        super().__init__()
        model = hf_models.build("qwen3_moe", seed=0)
        self.model = sml.convert(model) if convert else model

    def training_step(self, ids: Tensor, _: int) -> Tensor:
        loss: Tensor = self.model(input_ids=ids, labels=ids).loss
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(world_size: int, strategy: Any, convert: bool) -> dict[str, Tensor]:
    model = LanguageModel(convert)
    sequences = [ids for step in range(STEPS) for ids in hf_models.tokens(step, SEQUENCES)]
    indices = range(int(os.environ["RANK"]), len(sequences), world_size)
    loader = DataLoader(sequences, batch_size=SEQUENCES // world_size, sampler=indices)  # type: ignore[arg-type]
    cases.trainer(world_size, strategy, max_epochs=1, gradient_clip_val=1.0).fit(model, loader)
    return cases.whole(model)


def fit_ranks(world_size: int, mode: str) -> dict[str, Tensor]:
    return fit(world_size, sml.SwiftMoEStrategy(placement=RandomPolicy, slots_per_rank=4, dense=mode), True)


@pytest.mark.parametrize(("world_size", "mode"), [(2, "ddp"), (4, "ddp"), (2, "fsdp2")])
def test_ten_steps_on_ranks_equal_ten_of_the_original_on_one_process(world_size: int, mode: str) -> None:
    (expected,) = run_ranks(fit, 1, 1, "auto", False, init=False)
    for state in run_ranks(fit_ranks, world_size, world_size, mode, init=False):
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-4, msg=name)
