"""Expert groups smaller than the world under every framework: the same training and the same files as with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swiftmoe_lightning as sml
from tests.accelerate import test_prepare as test_accelerate
from tests.engine.models import RandomPolicy
from tests.helpers import nightly, only_by_day, run_ranks
from tests.huggingface import test_trainer as test_hf_trainer
from tests.strategies import cases, test_fabric
from tests.strategies.test_fully_sharded import Blocks

GROUPS = {"placement": RandomPolicy, "expert_parallel_size": 1}


def fit_groups(world_size: int, size: int, strategy: dict[str, Any], options: dict[str, Any]) -> dict[str, Tensor]:
    """The end state of a fit that validates twice."""
    model = Blocks()
    ours = sml.SwiftMoEStrategy(placement=RandomPolicy, expert_parallel_size=size, **strategy)
    runner = cases.trainer(world_size, ours, **options)
    runner.fit(model, cases.loader(world_size), torch.utils.data.DataLoader(cases.Noise(10), batch_size=3))
    assert len(ours.engine.layers) == 2
    assert ours.engine.layers[0].placement.world_size == size
    return cases.whole(model)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ({}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        *nightly(({"dense": "hsdp"}, {"gradient_clip_val": 0.1})),
        ({"dense": "fsdp2"}, {}),
    ],
    ids=str,
)
def test_a_fit_equals_one_process(strategy: dict[str, Any], options: dict[str, Any]) -> None:
    (expected,) = run_ranks(cases.fit, 1, 1, "auto", Blocks, options, init=False)
    for state in run_ranks(fit_groups, 4, 4, 2, strategy, options, init=False):
        cases.assert_close(state, expected, 1e-5)


def fit_on(world_size: int, size: int, path: str, directory: bool, steps: int) -> dict[str, Tensor]:
    """Fit until `steps`, from `path` if it is there, else saved there."""
    model = Blocks()
    ours = sml.SwiftMoEStrategy(
        placement=RandomPolicy, expert_parallel_size=size, save_distributed_checkpoint=directory
    )
    runner = cases.trainer(world_size, ours, max_steps=steps, max_epochs=-1)
    start = path if Path(path).exists() else None
    runner.fit(model, cases.loader(world_size), cases.loader(world_size), ckpt_path=start)
    if start is None:
        runner.save_checkpoint(path)
    return cases.whole(model)


@pytest.mark.parametrize("directory", [*nightly(False), True], ids=["file", "directory"])
@pytest.mark.parametrize(("first", "second"), [*nightly(((4, 2), (2, 2)), ((2, 2), (4, 2))), ((4, 2), (3, 1))], ids=str)
def test_checkpoints_go_on_with_other_groups(
    first: tuple[int, int], second: tuple[int, int], directory: bool, tmp_path: Path
) -> None:
    path = str(tmp_path / "run.ckpt")
    (expected,) = run_ranks(cases.fit, 1, 1, "auto", Blocks, {"max_epochs": 2}, init=False)
    run_ranks(fit_on, first[0], *first, path, directory, cases.NUM_BATCHES, init=False)
    for state in run_ranks(fit_on, second[0], *second, path, directory, 2 * cases.NUM_BATCHES, init=False):
        cases.assert_close(state, expected)


class AccelerateLoop(test_accelerate.Loop):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.config = sml.SwiftMoEConfig(**GROUPS)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", only_by_day(test_accelerate.CASES, "accumulated and clipped"))
def test_an_accelerate_loop_trains_like_plain_accelerate(options: dict[str, Any]) -> None:
    (expected, _) = run_ranks(test_accelerate.Loop(**options, ours=False), 2, init=False)
    for actual in run_ranks(AccelerateLoop(**options), 2, init=False):
        assert actual["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        test_accelerate.close(actual["state"], expected["state"])


class FabricLoop(test_fabric.Loop):
    def __call__(self) -> dict[str, Any]:
        if self.strategy is None:
            self.strategy = sml.SwiftMoEFabricStrategy(**GROUPS)  # type: ignore[arg-type, assignment]
        return super().__call__()


def test_a_fabric_loop_trains_like_ddp() -> None:
    options: dict[str, Any] = {"accumulation": 2, "clip": {"max_norm": 0.3}}
    (expected, _) = run_ranks(test_fabric.Loop("ddp", **options), 2, init=False)
    for actual in run_ranks(FabricLoop(**options), 2, init=False):
        test_fabric.assert_alike(actual, expected)


def train_with_trainer(folder: str, resume: str | None, grouped: bool) -> dict[str, Any]:
    options = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    made = test_hf_trainer.trainer(folder, save_strategy="steps", save_steps=3, **options)
    if grouped:
        made._swiftmoe_config = sml.SwiftMoEConfig(**GROUPS)  # type: ignore[arg-type]
    made.train(resume_from_checkpoint=resume)
    return test_hf_trainer.result(made)


def test_the_trainer_of_transformers_trains_and_resumes(tmp_path: Path) -> None:
    whole, grouped, again = (str(tmp_path / name) for name in ("whole", "grouped", "again"))
    (expected, _) = run_ranks(train_with_trainer, 2, whole, None, False, init=False)
    for actual in run_ranks(train_with_trainer, 2, grouped, None, True, init=False):
        test_hf_trainer.same("grouped", actual, expected)
    for actual in run_ranks(train_with_trainer, 2, again, f"{grouped}/checkpoint-3", True, init=False):
        test_hf_trainer.same("resumed", actual, expected)
