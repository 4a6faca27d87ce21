"""A plain Accelerate loop on W ranks is the same loop on one process, and its folders are Accelerate's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import nightly, only_by_day, run_ranks

STEPS = 6
BATCH = dense.TOKENS


def data(world_size: int, num_steps: int = STEPS) -> DataLoader[Any]:
    """Global batches of 24 tokens; Accelerate deals whole batches to the ranks in turn."""
    parts = [dense.batch(step, 0, torch.float64) for step in range(num_steps)]
    return DataLoader(TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True))), BATCH // world_size)


class Loop:
    """A training loop as Accelerate's documentation writes it."""

    def __init__(self, **options: Any) -> None:
        self.accumulation = options.pop("accumulation", 1)
        self.clip_norm, self.clip_value = options.pop("clip_norm", None), options.pop("clip_value", None)
        self.mixed_precision, self.ours = options.pop("mixed_precision", "no"), options.pop("ours", True)
        self.save, self.load = options.pop("save", None), options.pop("load", None)
        self.skip, self.stop = options.pop("skip", 0), options.pop("stop", STEPS)
        self.optimizer = options.pop("optimizer", torch.optim.AdamW)
        self.scheduled = options.pop("scheduled", True)
        self.config = sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4)
        assert not options

    def __call__(self) -> dict[str, Any]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = self.accelerator()
        model = models.build(torch.float64 if self.mixed_precision == "no" else torch.float32)
        optimizer = self.optimizer(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step * self.scheduled))
        prepare: Callable[..., Any] = accelerator.prepare
        if self.ours:

            def prepare(*objects: Any) -> Any:
                return sml.accelerate.prepare(accelerator, *objects, config=self.config)

        model, optimizer, loader, scheduler = prepare(model, optimizer, data(accelerator.num_processes), scheduler)
        if self.load:
            accelerator.load_state(self.load)
        losses = self.train(accelerator, model, optimizer, loader, scheduler)
        if self.save:
            accelerator.save_state(self.save)
        state = accelerator.get_state_dict(model)
        scale = None if accelerator.scaler is None else accelerator.scaler.get_scale()
        return {"state": {k: v.detach().clone() for k, v in state.items()}, "losses": losses, "scale": scale}

    def accelerator(self) -> Accelerator:
        precision = "no" if self.mixed_precision == "fp16" else self.mixed_precision
        made = Accelerator(cpu=True, gradient_accumulation_steps=self.accumulation, mixed_precision=precision)
        if self.mixed_precision == "fp16":
            # What it does for GPUs, and refuses without.
            made.state._mixed_precision, made.native_amp = "fp16", True
            made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=100)
        return made

    def train(
        self, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, loader: Any, scheduler: Any
    ) -> list[float]:
        losses = []
        for step, (x, target) in enumerate(loader):
            if not self.skip <= step < self.stop:
                continue
            with accelerator.accumulate(model):
                dtype = next(accelerator.unwrap_model(model).parameters()).dtype
                loss = F.mse_loss(model(x.to(dtype)), target.to(dtype))
                accelerator.backward(loss)
                if accelerator.sync_gradients and self.clip_norm:
                    accelerator.clip_grad_norm_(model.parameters(), self.clip_norm)
                if accelerator.sync_gradients and self.clip_value:
                    accelerator.clip_grad_value_(model.parameters(), self.clip_value)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(float(accelerator.gather_for_metrics(loss.detach()[None]).mean()))
        return losses


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )


CASES = {
    "plain": {},
    "accumulated": {"accumulation": 2},
    "clipped by norm": {"clip_norm": 0.3},
    "clipped by value": {"clip_value": 0.01, "optimizer": torch.optim.SGD},
    "accumulated and clipped": {"accumulation": 3, "clip_norm": 0.3},
    "state from the start": {"optimizer": partial(torch.optim.Adagrad, initial_accumulator_value=0.1)},
}


@pytest.mark.parametrize("options", only_by_day(CASES, "plain", "clipped by value", "accumulated and clipped"))
def test_ranks_with_spread_experts_train_like_plain_accelerate_with_whole_ones(options: dict[str, Any]) -> None:
    expected = run_ranks(Loop(**options, ours=False), 2, init=False)
    for actual, plain in zip(run_ranks(Loop(**options), 2, init=False), expected, strict=True):
        assert actual["losses"] == pytest.approx(plain["losses"], rel=1e-9)
        close(actual["state"], plain["state"])


def test_four_ranks_train_like_one_process() -> None:
    (expected,) = run_ranks(Loop(ours=False, scheduled=False), 1)
    for actual in run_ranks(Loop(scheduled=False), 4, init=False):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        close(actual["state"], expected["state"])


def test_one_process_is_a_plain_run() -> None:
    (expected,), (actual,) = run_ranks(Loop(ours=False), 1), run_ranks(Loop(), 1)
    close(actual["state"], expected["state"])


def test_bf16_differs_from_plain_accelerate_by_rounding_only() -> None:
    expected = run_ranks(Loop(mixed_precision="bf16", ours=False), 2, init=False)[0]
    for actual in run_ranks(Loop(mixed_precision="bf16"), 2, init=False):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=2e-2)
        close(actual["state"], expected["state"], rtol=2e-2)


def test_fp16_scales_clips_and_skips_like_plain_accelerate() -> None:
    options = {"mixed_precision": "fp16", "clip_norm": 0.3, "optimizer": torch.optim.SGD}
    expected = run_ranks(Loop(**options, ours=False), 2, init=False)[0]
    # Some steps were skipped, some were not.
    assert 1 < expected["scale"] < 2.0**20
    for actual in run_ranks(Loop(**options), 2, init=False):
        assert actual["scale"] == expected["scale"]
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-3)
        close(actual["state"], expected["state"], rtol=1e-3)


@pytest.mark.parametrize(("saver", "loader"), [*nightly((True, False), (False, True)), (True, True)])
def test_a_folder_of_save_state_goes_on_with_and_without_spread_experts(
    tmp_path: Path, saver: bool, loader: bool
) -> None:
    whole = run_ranks(Loop(ours=False), 2, init=False)[0]
    folder = str(tmp_path / "half")
    run_ranks(Loop(ours=saver, stop=3, save=folder), 2, init=False)
    for actual in run_ranks(Loop(ours=loader, skip=3, load=folder), 2, init=False):
        assert actual["losses"] == pytest.approx(whole["losses"][3:], rel=1e-9)
        close(actual["state"], whole["state"])


def test_a_folder_goes_on_at_another_number_of_processes(tmp_path: Path) -> None:
    (whole,) = run_ranks(Loop(ours=False, scheduled=False), 1)
    folder = str(tmp_path / "half")
    run_ranks(Loop(stop=3, save=folder, scheduled=False), 2, init=False)
    for actual in run_ranks(Loop(skip=3, load=folder, scheduled=False), 4, init=False):
        assert actual["losses"] == pytest.approx(whole["losses"][3:], rel=1e-9)
        close(actual["state"], whole["state"])


def options_of_ddp() -> tuple[bool, bool, str]:
    """What reaches DDP of the accelerator's handler and of prepare's own options, and the hook it runs."""
    handler = DistributedDataParallelKwargs(
        find_unused_parameters=True, static_graph=True, comm_hook=DDPCommunicationHookType.FP16
    )
    accelerator = Accelerator(cpu=True, kwargs_handlers=[handler])
    model = models.build()
    wrapped, _ = sml.accelerate.prepare(accelerator, model, torch.optim.SGD(model.parameters()), static_graph=False)
    wrapped(torch.randn(4, dense.DIM)).sum().backward()
    return (
        wrapped.find_unused_parameters,
        wrapped.static_graph,
        wrapped.logger._get_ddp_logging_data().strs_map["comm_hook"],
    )


def test_ddp_gets_the_options_and_the_hook_of_the_accelerator() -> None:
    for actual in run_ranks(options_of_ddp, 2, init=False):
        assert actual == (True, False, "fp16_compress_hook")


class Record(GeneralTracker):
    """A tracker as Accelerate's documentation writes one."""

    name, requires_logging_directory, main_process_only = "record", False, True

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[dict[str, Any]] = []

    @property
    def tracker(self) -> list[dict[str, Any]]:
        return self.entries

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        self.entries.append({"step": step, **values})


def track(ours: bool) -> list[dict[str, Any]]:
    accelerator = Accelerator(cpu=True, log_with=Record())
    model = models.build()
    prepare: Any = partial(sml.accelerate.prepare, accelerator) if ours else accelerator.prepare
    wrapped, optimizer = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.init_trackers("run")
    for step in range(3):
        x, target = (models.my_part(t, accelerator.process_index, 2) for t in dense.batch(step, 0, torch.float32))
        loss = F.mse_loss(wrapped(x), target)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": float(accelerator.reduce(loss.detach(), "mean"))}, step=step)
    if ours:
        # Plain DDP under gloo now and then hangs in it, when its reducer is freed after the process group.
        accelerator.end_training()
    actual: list[dict[str, Any]] = accelerator.trackers[0].tracker if accelerator.is_main_process else []
    return actual


def test_trackers_get_what_they_do_under_plain_accelerate() -> None:
    (first, second), (plain, _) = run_ranks(track, 2, True, init=False), run_ranks(track, 2, False, init=False)
    assert [entry["step"] for entry in first] == [0, 1, 2]
    assert [entry["loss"] for entry in first] == pytest.approx([entry["loss"] for entry in plain], rel=1e-5)
    assert second == []
