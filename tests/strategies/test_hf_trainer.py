"""SwiftMoETrainer on 2 ranks is transformers' Trainer under DDP on 2 ranks, with the same arguments, and its checkpoints
are ordinary ones.

The comparison with DDP is exact up to rounding: both see the same parts of each batch, and average gradients over ranks.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import swiftmoe_lightning as sml
from tests import hf_models
from tests.engine.models import RandomPolicy
from tests.helpers import rank_errors, run_ranks

pytest.importorskip("transformers")

STEPS = 6
FAMILIES = ["qwen3_moe", "mixtral"]


def rows(first: int, number: int) -> list[dict[str, Tensor]]:
    """Sequences of tokens, some of whose labels do not count."""
    sequences = [hf_models.tokens(step, 1)[0] for step in range(first, first + number)]
    return [{"input_ids": ids, "labels": ids.masked_fill(ids % 7 == 0, -100)} for ids in sequences]


def trainer(folder: str, family: str = "qwen3_moe", ours: bool = True, seed: int = 0, **options: Any) -> Any:
    """A Trainer as its documentation makes it; 7 sequences to evaluate are uneven over 2 ranks in batches of 2."""
    from transformers import Trainer, TrainingArguments

    defaults: dict[str, Any] = {
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    kind: Any = Trainer
    more = {}
    if ours:
        kind = sml.SwiftMoETrainer
        more = {"swiftmoe_config": sml.SwiftMoEConfig(slots_per_rank=4, placement=RandomPolicy)}
    model = hf_models.build(family, seed)
    arguments = TrainingArguments(folder, **{**defaults, **options})
    return kind(model, arguments, train_dataset=rows(0, 40), eval_dataset=rows(40, 7), **more)


def whole(made: Any) -> dict[str, Tensor]:
    state = made.model.state_dict() if getattr(made, "engine", None) is None else made.engine.full_state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


def history(made: Any, key: str) -> list[float]:
    return [float(entry[key]) for entry in made.state.log_history if key in entry]


def result(made: Any) -> dict[str, Any]:
    return {"state": whole(made), **{key: history(made, key) for key in ("loss", "grad_norm", "eval_loss")}}


def same(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance), key
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(
            found["state"][name],
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3},
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2},
    "the other family": {"family": "mixtral", "max_grad_norm": 0.3},
    "no clipping, another optimizer": {"max_grad_norm": 0.0, "optim": "adagrad"},
    "checkpointed activations": {"activation_checkpointing": True},
}


def train_with_and_without(folder: str) -> dict[str, tuple[dict[str, Any], dict[str, Any], int]]:
    outcomes = {}
    for case, options in CASES.items():
        plain, ours = trainer(folder, ours=False, **options), trainer(folder, **options)
        plain.train()
        placements = set()
        ours.add_callback(each_step(lambda made=ours, seen=placements: seen.add(str(made.engine.placements))))
        ours.train()
        outcomes[case] = result(plain), result(ours), len(placements)
    return outcomes


def each_step(call: Any) -> Any:
    from transformers import TrainerCallback

    class Each(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            call()

    return Each()


def test_two_ranks_train_like_the_plain_trainer_under_ddp(tmp_path: Path) -> None:
    for outcomes in run_ranks(train_with_and_without, 2, str(tmp_path), init=False, timeout_s=120):
        for case, (plain, ours, num_placements) in outcomes.items():
            print(case)
            same(ours, plain)
            assert num_placements > STEPS // 2, case
            assert len(plain["loss"]) == STEPS
        assert len(outcomes["evaluated"][0]["eval_loss"]) == 3


def train_and_resume(folder: str) -> dict[str, Any]:
    """Runs with and without us that go on from each other's checkpoints, and one that was never interrupted."""
    outcomes = {}
    saves = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    for kind in (True, False):
        made = trainer(f"{folder}/{kind}", ours=kind, **saves)
        made.train()
        outcomes["never stopped", kind] = result(made)
    for saver, loader in [(True, True), (True, False), (False, True)]:
        # Other initial values: all must come from the checkpoint.
        made = trainer(f"{folder}/again", ours=loader, seed=1, **saves)
        made.train(resume_from_checkpoint=f"{folder}/{saver}/checkpoint-3")
        outcomes[saver, loader] = result(made)
    return outcomes


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed(family: str, tmp_path: Path) -> None:
    outcomes = run_ranks(train_and_resume, 2, str(tmp_path), init=False, timeout_s=120)
    for outcome in outcomes:
        print({k: v["loss"] for k, v in outcome.items()})
