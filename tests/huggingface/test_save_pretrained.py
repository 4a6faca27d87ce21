"""`save_pretrained` and `get_state_dict` of models with spread experts, called as users do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine import save_pretrained
from tests import hf_models
from tests.helpers import rank_errors, run_ranks
from tests.huggingface.test_trainer import trainer as hf_trainer
from tests.strategies.cases import trainer

pytest.importorskip("transformers")


def assert_whole(folder: Path, state: dict[str, Tensor]) -> None:
    from transformers import AutoModelForCausalLM

    actual = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert actual.keys() == state.keys()
    for name, value in state.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)


def save_with_an_engine(folder: str, *positional: Any) -> dict[str, Tensor]:
    model = sml.convert(hf_models.build("qwen3_moe"))
    engine = sml.SwiftMoEEngine(model)
    model.save_pretrained(folder, *positional)
    return engine.full_state_dict()


@pytest.mark.parametrize("positional", [(), (True,), (True, None)])
def test_all_ranks_save_and_one_writes_whole_experts(positional: tuple[Any, ...], tmp_path: Path) -> None:
    states = run_ranks(save_with_an_engine, 2, str(tmp_path), *positional)
    assert_whole(tmp_path, states[0])


def save_in_turn(folder: str) -> dict[str, Tensor]:
    """As it is written for DDP: gathered by all, written by one, whatever the class does with it."""
    model = sml.convert(hf_models.build("mixtral"))
    engine = sml.SwiftMoEEngine(model)
    state = engine.full_state_dict()
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    return state


def test_a_state_that_was_gathered_is_written_by_one_rank(tmp_path: Path) -> None:
    assert_whole(tmp_path, run_ranks(save_in_turn, 2, str(tmp_path))[0])


def save_on_one_rank_alone(folder: str) -> None:
    save_pretrained._TIMEOUT_S = 2  # type: ignore[misc]
    model = sml.convert(hf_models.build("qwen3_moe"))
    sml.SwiftMoEEngine(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()


def test_one_rank_alone_is_told_whom_it_waits_for_and_the_others_end_with_it(tmp_path: Path) -> None:
    errors = rank_errors(save_on_one_rank_alone, 2, str(tmp_path))
    assert "rank 0 has waited 2 s in save_pretrained for ranks [1]" in errors[0]
    assert "call it on every rank (outside of `if rank == 0:`); one of them writes." in errors[0]
    assert "closed by peer" in errors[1]


class Inside(L.LightningModule):
    """A Hugging Face model in a module of the user's, who saves it at the end."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model, self.folder = sml.convert(hf_models.build("qwen3_moe")), folder

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss: Tensor = self.model(input_ids=hf_models.tokens(0), labels=hf_models.tokens(0)).loss
        return loss

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.zeros(4), batch_size=2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def on_train_end(self) -> None:
        self.model.save_pretrained(self.folder)


def fit_and_save(folder: str) -> dict[str, Tensor]:
    module = Inside(folder)
    made = trainer(2, "swiftmoe", max_epochs=1)
    made.fit(module)
    state = made.strategy.engine.full_state_dict()  # type: ignore[attr-defined]
    return {name.removeprefix("model."): value for name, value in state.items()}


def test_a_model_inside_of_a_lightning_module_is_saved_whole(tmp_path: Path) -> None:
    assert_whole(tmp_path, run_ranks(fit_and_save, 2, str(tmp_path), init=False)[0])


def ask_the_trainer(folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    made = hf_trainer(folder, max_steps=1)
    made.train()
    asked = made.accelerator.get_state_dict(made.model_wrapped)
    return {name: value.clone() for name, value in asked.items()}, made.engine.full_state_dict()


def test_the_trainers_accelerator_gives_whole_experts_on_every_rank(tmp_path: Path) -> None:
    for asked, expected in run_ranks(ask_the_trainer, 2, str(tmp_path), init=False):
        torch.testing.assert_close(asked, expected, rtol=0, atol=0)
