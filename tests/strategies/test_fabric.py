"""A Fabric loop under "swiftmoe" is the same loop under "ddp", and its files are Fabric's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.strategies.fabric import STATE_KEY
from tests.engine import dense, models
from tests.helpers import nightly, only_by_day, rank_errors, run_ranks

STEPS = 6


class Loop:
    """A training loop as Fabric's documentation writes it; `strategy` None takes ours, with moving placements."""

    def __init__(self, strategy: str | None = None, **options: Any) -> None:
        self.strategy, self.world_size = strategy, options.pop("world_size", 2)
        self.accumulation, self.clip = options.pop("accumulation", 1), options.pop("clip", None)
        self.precision, self.optimizer = options.pop("precision", None), options.pop("optimizer", torch.optim.AdamW)
        self.order = options.pop("order", "together")
        self.save, self.load = options.pop("save", None), options.pop("load", None)
        self.start, self.stop = options.pop("start", 0), options.pop("stop", STEPS)
        assert not options

    def __call__(self) -> dict[str, Any]:
        ours = sml.SwiftMoEFabricStrategy(placement=models.RandomPolicy, slots_per_rank=4)
        fabric = Fabric(
            accelerator="cpu", strategy=self.strategy or ours, devices=self.world_size, **self.precision_options()
        )
        fabric.launch()
        model: Any = models.build(torch.float32 if self.precision else torch.float64)
        model, optimizer = self.set_up(fabric, model)
        progress: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": self.start}
        if self.load:
            assert set(fabric.load(self.load, progress)) <= {STATE_KEY}
        losses = self.train(fabric, model, optimizer, progress)
        if self.save:
            fabric.save(self.save, progress)
        scaler = getattr(fabric.strategy.precision, "scaler", None)
        return {"state": whole(model), "losses": losses, "scale": None if scaler is None else scaler.get_scale()}

    def precision_options(self) -> dict[str, Any]:
        if self.precision != "16-mixed":
            return {"precision": self.precision}
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=100)
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}

    def set_up(self, fabric: Fabric, model: nn.Module) -> Any:
        if self.order == "together":
            return fabric.setup(model, self.optimizer(model.parameters(), lr=1e-2))
        if self.order == "optimizer made last":
            model = fabric.setup_module(model)
            return model, fabric.setup_optimizers(self.optimizer(model.parameters(), lr=1e-2))
        optimizer = self.optimizer(model.parameters(), lr=1e-2)
        return fabric.setup_module(model), fabric.setup_optimizers(optimizer)

    def train(self, fabric: Fabric, model: Any, optimizer: Any, progress: dict[str, Any]) -> list[float]:
        losses = []
        for step in range(progress["step"], self.stop):
            dtype = next(model.parameters()).dtype
            x, target = (models.my_part(t, fabric.global_rank, self.world_size) for t in dense.batch(step, 0, dtype))
            steps_now = (step + 1) % self.accumulation == 0
            with fabric.no_backward_sync(model, enabled=not steps_now):
                loss = F.mse_loss(model(x), target)
                fabric.backward(loss)
            if steps_now:
                if self.clip:
                    losses.append(float(fabric.clip_gradients(model, optimizer, **self.clip) or 0))
                optimizer.step()
                optimizer.zero_grad()
            losses.append(float(fabric.all_reduce(loss.detach())))
            progress["step"] = step + 1
        return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    state = {name: getattr(value, "full_tensor", lambda v=value: v)() for name, value in model.state_dict().items()}
    return {name: value.detach().clone() for name, value in state.items()}


def assert_alike(actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-9) -> None:
    assert actual["losses"] == pytest.approx(expected["losses"][-len(actual["losses"]) :], rel=tolerance)
    assert actual["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(actual["state"][name], value, rtol=tolerance, atol=tolerance)


def trained(world_size: int = 2, **options: Any) -> list[dict[str, Any]]:
    return run_ranks(Loop(world_size=world_size, **options), world_size, init=False)


CASES = {
    "plain": {},
    "accumulated": {"accumulation": 2},
    "clipped by norm": {"clip": {"max_norm": 0.3}},
    "clipped by the largest": {"clip": {"max_norm": 0.01, "norm_type": "inf"}},
    "clipped by value": {"clip": {"clip_val": 0.01}, "optimizer": torch.optim.SGD},
    "accumulated and clipped": {"accumulation": 3, "clip": {"max_norm": 0.3}},
    "state from the start": {"optimizer": partial(torch.optim.Adagrad, initial_accumulator_value=0.1)},
}


@pytest.mark.parametrize("options", only_by_day(CASES, "plain", "clipped by the largest", "accumulated and clipped"))
def test_ranks_with_spread_experts_train_like_plain_ddp_with_whole_ones(options: dict[str, Any]) -> None:
    for actual, expected in zip(trained(**options), trained(strategy="ddp", **options), strict=True):
        assert_alike(actual, expected)


@pytest.mark.parametrize("order", ["optimizer made first", "optimizer made last"])
def test_model_and_optimizer_can_be_set_up_one_after_the_other(order: str) -> None:
    for actual, expected in zip(trained(order=order), trained(strategy="ddp"), strict=True):
        assert_alike(actual, expected)


def test_one_device_is_a_plain_run() -> None:
    options = {"world_size": 1, "accumulation": 2, "clip": {"max_norm": 0.3}}
    assert_alike(trained(**options)[0], trained(strategy="ddp", **options)[0])


def test_bf16_differs_from_plain_ddp_by_rounding_only() -> None:
    options = {"precision": "bf16-mixed", "clip": {"max_norm": 0.3}, "optimizer": torch.optim.SGD}
    for actual, expected in zip(trained(**options), trained(strategy="ddp", **options), strict=True):
        assert_alike(actual, expected, tolerance=2e-2)


def test_16_mixed_scales_clips_and_skips_like_plain_ddp() -> None:
    options = {"precision": "16-mixed", "clip": {"clip_val": 0.01}, "optimizer": torch.optim.SGD}
    for actual, expected in zip(trained(**options), trained(strategy="ddp", **options), strict=True):
        # Some steps were skipped, some were not.
        assert 1 < actual["scale"] == expected["scale"] < 2.0**20
        assert_alike(actual, expected, tolerance=1e-3)


def scale_with_a_users_plugin() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    before = dict(vars(plugin))
    fabric = Fabric(accelerator="cpu", strategy="swiftmoe", devices=2, plugins=plugin)
    fabric.launch()
    model = models.build()
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(model(torch.randn(4, dense.DIM)).sum())
    optimizer.step()
    assert type(fabric.strategy.precision.scaler).__name__ == "ShardedGradScaler"  # type: ignore[attr-defined]
    assert all(vars(plugin)[key] is value for key, value in before.items())
    assert vars(plugin).keys() == before.keys()


def test_a_users_plugin_is_never_written_to() -> None:
    run_ranks(scale_with_a_users_plugin, 2, init=False)


def name_is_known() -> str:
    fabric = Fabric(accelerator="cpu", strategy="swiftmoe", devices=2)
    fabric.launch()
    model = fabric.setup(models.build())
    assert isinstance(fabric.strategy, sml.SwiftMoEFabricStrategy)
    assert len(fabric.strategy.engine.layers) == 2
    return type(model.module[1].experts.down_proj.data).__name__


def test_fabric_knows_the_strategy_by_name() -> None:
    assert run_ranks(name_is_known, 2, init=False) == ["DTensor", "DTensor"]


@pytest.mark.parametrize(
    ("saver", "loader"),
    [((2, None), (2, "ddp")), *nightly(((2, "ddp"), (2, None)), ((2, None), (2, None))), ((2, None), (4, None))],
    ids=["to ddp", "from ddp", "ours", "ours at four ranks"],
)
def test_a_file_goes_on_with_and_without_spread_experts(tmp_path: Path, saver: Any, loader: Any) -> None:
    expected = trained(strategy="ddp")[0]
    path = str(tmp_path / "half.ckpt")
    trained(saver[0], strategy=saver[1], stop=3, save=path)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["step"] == 3
    assert checkpoint["model"]["1.experts.down_proj"].shape[0] == dense.NUM_EXPERTS
    for actual in trained(loader[0], strategy=loader[1], load=path):
        assert_alike(actual, expected)


def two_models() -> None:
    fabric = Fabric(accelerator="cpu", strategy="swiftmoe", devices=2)
    fabric.launch()
    first, second = models.build(), models.build()
    one, two = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (first, second))
    both = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    first, one = fabric.setup(first, one)
    second, two = fabric.setup(second, two)
    x = torch.randn(4, dense.DIM)
    fabric.backward(first(x).sum() + second(x).sum())
    for optimizer in (one, two):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole(first).values(), whole(second).values(), strict=True))
    with pytest.raises(ValueError, match="holds experts of several models. Make one optimizer for each"):
        fabric.setup_optimizers(both)


def test_each_of_two_models_has_its_engine() -> None:
    run_ranks(two_models, 2, init=False)


def launched() -> Fabric:
    fabric = Fabric(accelerator="cpu", strategy="swiftmoe", devices=2)
    fabric.launch()
    return fabric


def set_the_optimizer_up_first() -> None:
    launched().setup_optimizers(torch.optim.AdamW(models.build().parameters()))


def set_up_after_a_step() -> None:
    model = models.build()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, dense.DIM)).sum().backward()
    optimizer.step()
    launched().setup(model, optimizer)


def clip_what_is_not_finite() -> None:
    fabric = launched()
    model = models.build()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    fabric.backward(model(torch.randn(4, dense.DIM)).sum() * float("inf"))
    fabric.clip_gradients(model, optimizer, max_norm=1.0)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (set_the_optimizer_up_first, "12 parameters of the optimizer belong to no model that has been set up"),
        (set_up_after_a_step, "the optimizer has stepped already"),
        (clip_what_is_not_finite, "is non-finite, so it cannot be clipped. Pass error_if_nonfinite=False"),
    ],
)
def test_misuse_is_named_on_every_rank(misuse: Callable[[], None], message: str) -> None:
    for error in rank_errors(misuse, 2, init=False):
        assert message in error


def load_what_one_rank_cannot_read(folder: str) -> None:
    fabric = launched()
    model = fabric.setup(models.build())
    fabric.save(f"{folder}/model.ckpt", {"model": model})
    fabric.load(f"{folder}/model.ckpt" if fabric.global_rank == 0 else f"{folder}/nothing.ckpt", {"model": model})


def test_a_file_that_one_rank_cannot_read_is_an_error_on_every_rank(tmp_path: Path) -> None:
    first, second = rank_errors(load_what_one_rank_cannot_read, 2, str(tmp_path), init=False)
    assert "cannot read the checkpoint" in first
    assert "another rank could not read it" in first
    assert "FileNotFoundError" in second


def test_the_engine_is_there_only_once_a_model_is_set_up() -> None:
    with pytest.raises(RuntimeError, match="call fabric.setup first"):
        _ = sml.SwiftMoEFabricStrategy().engine
