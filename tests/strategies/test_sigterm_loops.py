"""The docs' loops without a Lightning Trainer: SIGTERM to one rank, all save after the same step, and losses go on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from accelerate import Accelerator
from lightning.fabric import Fabric
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import run_ranks
from tests.strategies.sigterm_runs import BLOCKS

NUM_STEPS, STOP_AT = 12, 5


def run_block(number: int, **names: Any) -> None:
    names["signal"] = signal
    exec(compile(BLOCKS[number], "stopping-and-resuming.md", "exec"), names)


def terminate(rank: int, step: int) -> None:
    if (rank, step) == (1, STOP_AT):
        os.kill(os.getpid(), signal.SIGTERM)


def loss_of(model: Any, step: int, rank: int, world_size: int) -> Any:
    x, y = (models.my_part(tensor, rank, world_size) for tensor in dense.batch(step, 0, torch.float64))
    return F.mse_loss(model(x), y)


def plain(folder: str, stops: bool) -> dict[int, float]:
    """Saved by torch's own distributed checkpoints."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(model)
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses, first_step = {}, 0

    def train_one_step(step: int) -> None:
        if stops:
            terminate(rank, step)
        loss = loss_of(wrapped, step, rank, world_size)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
        losses[step] = float(loss.detach()) / world_size

    def state() -> dict[str, Any]:
        return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}

    def save(step: int) -> None:
        dcp.save(state(), checkpoint_id=folder)
        torch.save({"engine": engine.state_dict(), "step": step}, Path(folder, f"rest-{rank}.pt"))

    if Path(folder).exists():
        loaded, rest = state(), torch.load(Path(folder, f"rest-{rank}.pt"), weights_only=True)
        dcp.load(loaded, checkpoint_id=folder)
        set_model_state_dict(model, loaded["model"])
        set_optimizer_state_dict(model, optimizer, loaded["optimizer"])
        engine.load_state_dict(rest["engine"])
        engine.mark_stale()
        first_step = rest["step"]
    run_block(1, engine=engine, first_step=first_step, num_steps=NUM_STEPS, train_one_step=train_one_step, save=save)
    return losses


def fabric(folder: str, stops: bool) -> dict[int, float]:
    made = Fabric(accelerator="cpu", devices=2, strategy="swiftmoe")
    made.launch()
    model, optimizer = models.build(torch.float64), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = made.setup(model, optimizer)
    losses: dict[int, float] = {}
    state = {"model": model, "optimizer": optimizer, "step": 0}

    def train_one_step(step: int) -> None:
        if stops:
            terminate(made.global_rank, step)
        loss = loss_of(model, step, made.global_rank, 2)
        made.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses[step] = float(made.all_reduce(loss.detach()))

    def save(step: int) -> None:
        made.save(folder, {**state, "step": step})

    if Path(folder).exists():
        made.load(folder, state)
    steps = {"first_step": state["step"], "num_steps": NUM_STEPS}
    run_block(1, engine=made.strategy.engine, train_one_step=train_one_step, save=save, **steps)  # type: ignore[attr-defined]
    return losses


def accelerate(folder: str, stops: bool) -> dict[int, float]:
    """Two micro-batches a step; the signal comes between them."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    parts = [dense.batch(step, 0, torch.float64) for step in range(NUM_STEPS)]
    data = DataLoader(TensorDataset(*(torch.cat(t) for t in zip(*parts, strict=True))), dense.TOKENS // 2)
    model = models.build(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, data = sml.accelerate.prepare(accelerator, model, optimizer, data)
    losses: dict[int, float] = {}
    first = 0
    checkpoint = Path(folder, "checkpoints", "last")
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    if checkpoint.exists():
        accelerator.load_state(str(checkpoint))
        first = int(Path("step").read_text())
        data = accelerator.skip_first_batches(data, first)

    def train_one_step(batch: Any) -> None:
        step = first + len(losses)
        if stops:
            terminate(accelerator.process_index, step - 1)
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(batch[0]), batch[1])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses[step] = float(accelerator.reduce(loss.detach(), "mean"))
        Path("step").write_text(str(step + 1))

    run_block(2, model=model, loader=data, accelerator=accelerator, train_one_step=train_one_step)
    return losses


@pytest.mark.parametrize(("loop", "init"), [(plain, True), (fabric, False), (accelerate, False)])
def test_all_ranks_save_after_the_same_step_and_losses_go_on(
    loop: Callable[[str, bool], dict[int, float]], init: bool, tmp_path: Path
) -> None:
    (expected, _) = run_ranks(loop, 2, str(tmp_path / "whole"), False, init=init)
    first = run_ranks(loop, 2, str(tmp_path / "run"), True, init=init)
    rest = run_ranks(loop, 2, str(tmp_path / "run"), False, init=init)
    num_steps = STOP_AT + 1 if loop is not accelerate else STOP_AT + 3
    for stopped, resumed in zip(first, rest, strict=True):
        assert [*stopped] == [*range(num_steps)]
        assert [*resumed] == [*range(num_steps, NUM_STEPS)]
        assert {**stopped, **resumed} == pytest.approx(expected, abs=1e-9)


def hugging_face(folder: str, stops: bool) -> list[tuple[int, float]]:
    from transformers import TrainerCallback

    from tests.huggingface.test_trainer import trainer

    class Terminate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if stops:
                terminate(args.process_index, state.global_step)

    made = trainer(folder, family="module", max_steps=NUM_STEPS)
    made.add_callback(Terminate())
    run_block(3, trainer=made, TrainerCallback=TrainerCallback)
    made.train(resume_from_checkpoint=Path(folder, f"checkpoint-{STOP_AT + 1}").exists())
    return [(entry["step"], float(entry["loss"])) for entry in made.state.log_history if "loss" in entry]


def test_a_hugging_face_trainer_saves_and_its_losses_go_on(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (expected, _) = run_ranks(hugging_face, 2, str(tmp_path / "whole"), False, init=False)
    (stopped, _) = run_ranks(hugging_face, 2, str(tmp_path / "run"), True, init=False)
    (resumed, _) = run_ranks(hugging_face, 2, str(tmp_path / "run"), False, init=False)
    assert stopped == expected[: STOP_AT + 1]
    assert [step for step, _ in resumed] == [*range(1, NUM_STEPS + 1)]
    assert dict(resumed) == pytest.approx(dict(expected), abs=1e-6)


def test_a_single_process_stops_without_an_exchange() -> None:
    engine = sml.SwiftMoEEngine(models.build())
    assert not engine.stops
    engine.request_stop()
    assert engine.stops
