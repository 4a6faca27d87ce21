"""Ranks started by spawn, fork and forkserver from a running process, as in a notebook: what comes back to it."""

from __future__ import annotations

import copy
import io
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.connectors import accelerator_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.multiprocessing import ProcessRaisedException
from torch.utils.data import DataLoader, Sampler

import swiftmoe_lightning as sml
from swiftmoe_lightning.strategies import start_methods
from tests.engine import dense, models
from tests.helpers import from_one_process
from tests.strategies.cases import DIM, GLOBAL_BATCH, Model, Noise, assert_close, trainer


class InTurn(Sampler[int]):
    """Deals samples to the ranks in turn: W ranks have the global batches of one. It is made before there are ranks."""

    def __init__(self, size: int, world_size: int) -> None:
        self.size, self.world_size = size, world_size

    def __len__(self) -> int:
        return self.size // self.world_size

    def __iter__(self) -> Iterator[int]:
        return iter(range(dist.get_rank() if dist.is_initialized() else 0, self.size, self.world_size))


def batches(world_size: int, num_batches: int = 4) -> DataLoader[tuple[Tensor, Tensor]]:
    size = GLOBAL_BATCH * num_batches
    return DataLoader(Noise(size), batch_size=GLOBAL_BATCH // world_size, sampler=InTurn(size, world_size))


def fitted(world_size: int, strategy: Any, make: Callable[[], L.LightningModule], **options: Any) -> L.LightningModule:
    module = make()
    trainer(world_size, strategy, **options).fit(module, batches(world_size), batches(world_size, 1))
    return module


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state, whose tensors have to be plain."""
    state = module.state_dict()
    assert {type(value) for value in state.values()} == {Tensor}
    return copy.deepcopy(state)


def run_twice_and_evaluate(world_size: int, strategy: Any, folder: str) -> dict[str, Any]:
    """A day in a notebook. Returns the state after either fit, and numbers of the evaluations."""
    module = Model()
    checkpoint = ModelCheckpoint(folder, monitor="val_loss", save_weights_only=True)
    runner = trainer(world_size, strategy, callbacks=[checkpoint], enable_checkpointing=True)
    runner.fit(module, batches(world_size), batches(world_size, 1))
    states = [state_of(module)]
    losses = [runner.callback_metrics["val_loss"].item()]
    losses += [result["val_loss"] for result in runner.validate(module, batches(world_size, 1), verbose=False)]
    losses += [result["test_loss"] for result in runner.test(module, batches(world_size, 1), verbose=False)]
    best = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    Model().load_state_dict(best)
    torch.save(copy.deepcopy(module), io.BytesIO())
    # Without ranks the module is an ordinary one, which trains on.
    with torch.no_grad():
        losses.append(module.loss(next(iter(batches(1)))).item())
    trainer(world_size, strategy).fit(module, batches(world_size), batches(world_size, 1))
    return {"states": [*states, state_of(module)], "losses": losses, "finished": runner.state.finished}


def test_weights_metrics_and_results_come_back_and_the_module_trains_on(tmp_path: Path) -> None:
    expected = from_one_process(run_twice_and_evaluate, 1, "auto", str(tmp_path / "one"))
    actual = from_one_process(run_twice_and_evaluate, 2, "swiftmoe_notebook", str(tmp_path / "two"))
    for state, expected_state in zip(actual["states"], expected["states"], strict=True):
        assert_close(state, expected_state)
    assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert actual["finished"]


class MadeByRanks(Model):
    """The block is made in configure_model, on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.moe = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.moe is None:
            self.moe = sml.MoE(DIM, 10, 5, 2, device="meta")


def fit_by_every_other_way(folder: str) -> dict[str, dict[str, Tensor]]:
    """By the other start methods, and by other ways to cut and to make a model."""
    multiprocessing.set_forkserver_preload(["tests.preload"])
    checkpoint = ModelCheckpoint(folder, save_last=True, save_weights_only=True)
    saves = {"callbacks": [checkpoint], "enable_checkpointing": True}
    return {
        "one process": state_of(fitted(1, "auto", Model)),
        "spawn": state_of(fitted(2, "swiftmoe_spawn", Model)),
        "forkserver": state_of(fitted(2, sml.SwiftMoEStrategy(start_method="forkserver"), Model)),
        "fsdp2": state_of(fitted(2, sml.SwiftMoEStrategy(start_method="fork", dense="fsdp2"), Model)),
        "made by ranks": state_of(fitted(2, "swiftmoe_fork", MadeByRanks, **saves)),
        "saved by ranks": torch.load(f"{folder}/last.ckpt", weights_only=True)["state_dict"],
    }


def test_weights_come_back_whole_from_any_start_method_and_however_the_model_is_made(tmp_path: Path) -> None:
    states = from_one_process(fit_by_every_other_way, str(tmp_path))
    for name in ("spawn", "forkserver", "fsdp2"):
        assert_close(states[name], states["one process"])
    assert_close(states["made by ranks"], states["saved by ranks"], 0)


class Fails(Model):
    """Rank 1 raises, exits or gets a SIGTERM in its third batch."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__()
        self.action = action

    def training_step(self, batch: tuple[Tensor, Tensor], i: int) -> Tensor:  # type: ignore[override]
        if self.trainer.global_rank == 1 and i == 2:
            self.action()
        return super().training_step(batch, i)


def divide() -> None:
    raise ZeroDivisionError("of rank 1")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def errors_of_failing_ranks() -> list[tuple[str, bool]]:
    """For each failure, what the process that started the ranks raises, and whether its module is unchanged."""
    outcomes = []
    for action in (divide, partial(sys.exit, 0), terminate):
        module = Fails(action)
        before = state_of(module)
        with pytest.raises(ProcessRaisedException) as caught:
            trainer(2, "swiftmoe_fork").fit(module, batches(2), batches(2, 1))
        outcomes.append((str(caught.value), all(torch.equal(v, before[k]) for k, v in module.state_dict().items())))
    return outcomes


def test_a_rank_that_fails_exits_or_is_stopped_ends_all_with_an_error() -> None:
    messages, unchanged = zip(*from_one_process(errors_of_failing_ranks), strict=True)
    # Rank 0, which misses it, may be the first that is found to have failed.
    assert "ZeroDivisionError: of rank 1" in messages[0] or "by peer" in messages[0]
    assert "stopped by SystemExit(0)" in messages[1] or "by peer" in messages[1]
    assert "stopped by SIGTERMException" in messages[2]
    assert all(unchanged)


def train_with(fabric: Fabric, path: str) -> float:
    """Six steps of a Fabric loop, and a file. Returns the last loss."""
    model: Any = models.build(torch.float64)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(6):
        whole_batch = dense.batch(step, 0, torch.float64)
        x, target = (models.my_part(t, fabric.global_rank, fabric.world_size) for t in whole_batch)
        loss = F.mse_loss(model(x), target)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    fabric.save(path, {"model": model})
    return float(fabric.all_reduce(loss.detach()))  # type: ignore[arg-type]


def launch_fabric(folder: str) -> list[float]:
    """On one rank and on two."""
    return [
        Fabric(accelerator="cpu", devices=devices, strategy="swiftmoe_fork").launch(train_with, f"{folder}/{devices}")
        for devices in (1, 2)
    ]


def test_a_function_that_fabric_launches_trains_as_on_one_process(tmp_path: Path) -> None:
    alone, together = from_one_process(launch_fabric, str(tmp_path))
    assert together == pytest.approx(alone, rel=1e-12)
    expected, actual = (torch.load(tmp_path / str(n), weights_only=True)["model"] for n in (1, 2))
    assert_close(actual, expected, 1e-12)


@pytest.mark.parametrize(
    ("name", "start_method"),
    [("swiftmoe", "popen"), ("swiftmoe_spawn", "spawn"), ("swiftmoe_fork", "fork"), ("swiftmoe_notebook", "fork")],
)
def test_each_start_method_has_a_name_as_those_of_ddp(name: str, start_method: str) -> None:
    for strategy in (trainer(2, name).strategy, Fabric(accelerator="cpu", devices=2, strategy=name).strategy):
        assert isinstance(strategy, (sml.SwiftMoEStrategy, sml.SwiftMoEFabricStrategy))
        assert strategy._start_method == start_method


@pytest.mark.parametrize("registry", [StrategyRegistry, STRATEGY_REGISTRY])
def test_there_is_a_name_for_every_one_of_ddp(registry: dict[str, Any]) -> None:
    of_ddp = {name: registry[name]["init_params"] for name in registry if name.startswith("ddp")}
    assert "ddp_find_unused_parameters_true" in of_ddp
    ours = {name: registry[name]["init_params"] for name in registry if name.startswith("swiftmoe")}
    assert ours == {name.replace("ddp", "swiftmoe"): options for name, options in of_ddp.items()}


def test_a_notebook_is_told_the_name_that_works_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_methods, "_IS_INTERACTIVE", True)
    monkeypatch.setattr(accelerator_connector, "_IS_INTERACTIVE", True)
    for name in ("swiftmoe", "swiftmoe_spawn"):
        with pytest.raises(MisconfigurationException, match="Use strategy='swiftmoe_notebook'"):
            trainer(2, name)
        with pytest.raises(MisconfigurationException, match="Use strategy='swiftmoe_notebook'"):
            Fabric(accelerator="cpu", devices=2, strategy=name)
    assert trainer(2, "swiftmoe_notebook").strategy.launcher.is_interactive_compatible  # type: ignore[union-attr]


def test_a_fork_of_a_process_that_uses_cuda_is_refused_as_by_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(RuntimeError, match="Cannot re-initialize CUDA in forked subprocess"):
        trainer(2, "swiftmoe_notebook").fit(Model())


@pytest.mark.parametrize("start_method", ["spawn", "fork"])
def test_tensor_parallel_ranks_are_not_started_where_weights_could_not_come_back(start_method: Any) -> None:
    with pytest.raises(ValueError, match=f"start_method='{start_method}' returns the weights has none. Use torchrun"):
        sml.SwiftMoEStrategy(tensor_parallel_size=2, start_method=start_method)
