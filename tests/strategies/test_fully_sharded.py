"""dense="fsdp2" under every framework: the same training and the same files as with whole dense parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import swiftmoe_lightning as sml
from tests.accelerate import test_prepare as test_accelerate
from tests.engine.models import RandomPolicy
from tests.helpers import nightly, only_by_day, rank_errors, run_ranks
from tests.huggingface import test_trainer as test_hf_trainer
from tests.strategies import cases, test_fabric


class Layer(nn.Module):
    """tanh, then a linear or a MoE beside it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x.tanh())


class Blocks(cases.Model):
    """Two layers of a transformer's kind, which FSDP2 gathers by themselves, and a head that a step uses directly."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer(nn.Linear(cases.DIM, cases.DIM)), Layer(sml.MoE(cases.DIM, 6, 3, 1))])

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self.loss(batch) + self.outer.weight.square().sum()


def strategy(**options: Any) -> sml.SwiftMoEStrategy:
    return sml.SwiftMoEStrategy(dense="fsdp2", placement=RandomPolicy, slots_per_rank=4, **options)


def fit_cut(world_size: int, options: dict[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The end state of a fit that validates twice, and how many elements this rank held."""
    model = Blocks()
    runner = cases.trainer(world_size, strategy(), **options)
    runner.fit(model, cases.loader(world_size), cases.loader(world_size, cases.GLOBAL_BATCH))
    state = cases.whole(model)
    return state, sum(p.to_local().numel() for p in model.parameters() if isinstance(p, DTensor))


FITS = {
    "plain": {},
    "accumulated and clipped by norm": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("options", FITS.values(), ids=FITS)
def test_a_fit_equals_one_process(options: dict[str, Any]) -> None:
    (expected,) = run_ranks(cases.fit, 1, 1, "auto", Blocks, options, init=False)
    outcomes = run_ranks(fit_cut, 2, 2, options, init=False)
    for state, _ in outcomes:
        cases.assert_close(state, expected, 2e-2 if "precision" in options else 1e-5)
    assert sum(num_elements for _, num_elements in outcomes) == sum(value.numel() for value in expected.values())


def predict_unevenly() -> list[int]:
    """Fit, then predict 8 samples one by one: ranks have 3, 3 and 2 batches."""
    model = Blocks()
    runner = cases.trainer(3, strategy(), use_distributed_sampler=True, max_epochs=1)
    runner.fit(model, cases.loader(3), torch.utils.data.DataLoader(cases.Noise(10), batch_size=3))
    actual = runner.predict(model, torch.utils.data.DataLoader(cases.Noise(8)))
    runner.fit_loop.max_epochs = 2
    runner.fit(model, cases.loader(3), cases.loader(3, 30))
    return [len(batch) for batch in actual or []]


def test_ranks_may_have_differently_many_evaluation_batches() -> None:
    assert [sum(sizes) for sizes in run_ranks(predict_unevenly, 3, init=False)] == [3, 3, 2]


def run(world_size: int, mode: str, path: str, steps: int) -> dict[str, Tensor]:
    """Fit until `steps`, from `path` if it is there, else written there; the end state."""
    model = Blocks()
    ours: Any = {
        "fsdp2": lambda: strategy(),
        "fsdp2 directory": lambda: strategy(save_distributed_checkpoint=True),
        "swiftmoe": lambda: "swiftmoe",
        "ddp": lambda: "ddp",
    }[mode]
    runner = cases.trainer(world_size, ours(), max_steps=steps, max_epochs=-1)
    start = path if Path(path).exists() else None
    runner.fit(model, cases.loader(world_size), cases.loader(world_size), ckpt_path=start)
    if start is None:
        runner.save_checkpoint(path)
    else:
        # The module is cut by now; what is loaded is whole.
        runner.validate(model, cases.loader(world_size), ckpt_path=path, verbose=False)
        runner = cases.trainer(world_size, ours(), max_steps=steps, max_epochs=-1)
        runner.fit(model, cases.loader(world_size), cases.loader(world_size), ckpt_path=path)
    return cases.whole(model)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *nightly(((2, "fsdp2"), (3, "fsdp2"))),
        ((2, "fsdp2 directory"), (3, "fsdp2 directory")),
        ((2, "fsdp2"), (2, "ddp")),
        *nightly(((2, "ddp"), (2, "fsdp2")), ((2, "fsdp2 directory"), (2, "swiftmoe"))),
        ((2, "swiftmoe"), (3, "fsdp2")),
    ],
    ids=str,
)
def test_checkpoints_go_on_at_any_world_size_and_with_whole_parameters(
    first: tuple[int, str], second: tuple[int, str], tmp_path: Path
) -> None:
    path = str(tmp_path / "run.ckpt")
    (expected,) = run_ranks(cases.fit, 1, 1, "auto", Blocks, {"max_epochs": 2}, init=False)
    run_ranks(run, first[0], *first, path, cases.NUM_BATCHES, init=False)
    for state in run_ranks(run, second[0], *second, path, 2 * cases.NUM_BATCHES, init=False):
        cases.assert_close(state, expected)


def average() -> None:
    runner = cases.trainer(2, strategy(), callbacks=[WeightAveraging()])
    runner.fit(Blocks(), cases.loader(2), cases.loader(2))


def test_averaged_weights_are_refused_with_the_fix() -> None:
    for error in rank_errors(average, 2, init=False):
        assert "WeightAveraging copies the module" in error
        assert "Use dense='ddp'" in error


CONFIG = sml.SwiftMoEConfig(dense="fsdp2", placement=RandomPolicy, slots_per_rank=4)


class AccelerateLoop(test_accelerate.Loop):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.config = CONFIG


@pytest.mark.parametrize("options", only_by_day(test_accelerate.CASES, "accumulated and clipped"))
def test_an_accelerate_loop_trains_like_plain_accelerate(options: dict[str, Any]) -> None:
    (expected, _) = run_ranks(test_accelerate.Loop(**options, ours=False), 2, init=False)
    for actual in run_ranks(AccelerateLoop(**options), 2, init=False):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        test_accelerate.close(actual["state"], expected["state"])


@pytest.mark.parametrize("second", [AccelerateLoop, test_accelerate.Loop])
def test_folders_of_accelerate_go_on(second: Any, tmp_path: Path) -> None:
    (expected, _) = run_ranks(test_accelerate.Loop(ours=False), 2, init=False)
    run_ranks(AccelerateLoop(stop=3, save=str(tmp_path)), 2, init=False)
    ours = {} if second is AccelerateLoop else {"ours": False}
    for actual in run_ranks(second(skip=3, load=str(tmp_path), **ours), 2, init=False):
        test_accelerate.close(actual["state"], expected["state"])


class FabricLoop(test_fabric.Loop):
    def __call__(self) -> dict[str, Any]:
        if self.strategy is None:
            options = {"dense": "fsdp2", "placement": RandomPolicy, "slots_per_rank": 4}
            self.strategy = sml.SwiftMoEFabricStrategy(**options)  # type: ignore[arg-type, assignment]
        return super().__call__()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulation": 2, "clip": {"max_norm": 0.3}},
        {"clip": {"clip_val": 0.01}, "order": "optimizer made last"},
        {"order": "optimizer made first"},
    ],
    ids=str,
)
def test_a_fabric_loop_trains_like_ddp(options: dict[str, Any]) -> None:
    (expected, _) = run_ranks(test_fabric.Loop("ddp", **options), 2, init=False)
    for actual in run_ranks(FabricLoop(**options), 2, init=False):
        test_fabric.assert_alike(actual, expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_files_of_fabric_go_on(world_size: int, tmp_path: Path) -> None:
    path = str(tmp_path / "run.ckpt")
    (expected, _) = run_ranks(test_fabric.Loop("ddp"), 2, init=False)
    run_ranks(FabricLoop(stop=3, save=path), 2, init=False)
    for actual in run_ranks(FabricLoop(load=path, world_size=world_size), world_size, init=False):
        test_fabric.assert_alike(actual, expected)


def train_with_trainer(folder: str, resume: str | None, cut: bool) -> dict[str, Any]:
    options = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    made = test_hf_trainer.trainer(folder, save_strategy="steps", save_steps=3, **options)
    if cut:
        made._swiftmoe_config = CONFIG
    made.train(resume_from_checkpoint=resume)
    assert cut == any(isinstance(p, DTensor) and "experts" not in name for name, p in made.model.named_parameters())
    return test_hf_trainer.result(made)


def test_the_trainer_of_transformers_trains_and_resumes(tmp_path: Path) -> None:
    whole, cut, again = (str(tmp_path / name) for name in ("whole", "cut", "again"))
    (expected, _) = run_ranks(train_with_trainer, 2, whole, None, False, init=False)
    for actual in run_ranks(train_with_trainer, 2, cut, None, True, init=False):
        test_hf_trainer.same("cut", actual, expected)
    for actual in run_ranks(train_with_trainer, 2, again, f"{cut}/checkpoint-3", True, init=False):
        test_hf_trainer.same("resumed", actual, expected)
