"""SwiftMoETrainer on 2 ranks is transformers' Trainer under DDP on 2 ranks, with the same arguments and checkpoints.

The comparison with DDP is exact but for rounding: both see the same parts of a batch, and average gradients over ranks.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

import swiftmoe_lightning as sml
from tests import hf_models
from tests.engine.models import RandomPolicy
from tests.helpers import run_ranks

transformers = pytest.importorskip("transformers")

STEPS = 6
# transformers 5.17 knows it by its older name alone.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)


class Regression(nn.Module):
    """Not a transformers model: any module with our MoE will do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(hf_models.VOCABULARY, 16)
        self.moe = sml.MoE(dim=16, hidden_dim=12, num_experts=5, top_k=2)
        self.head = nn.Linear(16, 1)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        logits = self.head(hidden + self.moe(hidden))[..., 0]
        return {"loss": (logits - labels / hf_models.VOCABULARY).square().mean(), "logits": logits}


def build(family: str, seed: int) -> Any:
    if family == "dense":
        return nn.Linear(2, 2)
    if family != "module":
        return hf_models.build(family, seed)
    torch.manual_seed(seed)
    return Regression()


def rows(first: int, number: int) -> list[dict[str, Tensor]]:
    """Sequences of tokens, some of whose labels do not count."""
    sequences = [hf_models.tokens(step, 1)[0] for step in range(first, first + number)]
    return [{"input_ids": ids, "labels": ids.masked_fill(ids % 7 == 0, -100)} for ids in sequences]


def trainer(folder: str, *, ours: bool = True, family: str = "qwen3_moe", seed: int = 0, **options: Any) -> Any:
    """A Trainer as its documentation makes it. The 7 sequences to evaluate are uneven over 2 ranks in batches of 2."""
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
    more: dict[str, Any] = {}
    if ours:
        more["swiftmoe_config"] = sml.SwiftMoEConfig(slots_per_rank=4, placement=RandomPolicy)
    model = build(family, seed)
    if options.pop("own_optimizer", False):
        more["optimizers"] = (torch.optim.AdamW(model.parameters(), lr=1e-3), None)
    if options.pop("model_init", False):
        model, more["model_init"] = None, lambda: build(family, seed)
    scales = options.pop("fp16", False)
    arguments = TrainingArguments(folder, **{**defaults, **options})
    kind: Any = sml.SwiftMoETrainer if ours else Trainer
    made = kind(model, arguments, train_dataset=rows(0, 40), eval_dataset=rows(40, 7), **more)
    if scales:
        # What its accelerator does for GPUs, and refuses without.
        made.accelerator.state._mixed_precision, made.accelerator.native_amp = "fp16", True
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=100)
    return made


def result(made: Any) -> dict[str, Any]:
    engine = getattr(made, "engine", None)
    state = made.model.state_dict() if engine is None else engine.full_state_dict()
    logs = {
        key: [float(entry[key]) for entry in made.state.log_history if key in entry]
        for key in ("loss", "grad_norm", "eval_loss")
    }
    return {"state": {name: value.detach().clone() for name, value in state.items()}, **logs}


def same(case: Any, actual: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-4) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        assert actual[key] == pytest.approx(expected[key], rel=tolerance, nan_ok=True), (case, key)
    assert actual["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(
            actual["state"][name],
            value,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{case}, {name}: {text}",
        )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated and clipped": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.3},
    "evaluated in between": {"eval_strategy": "steps", "eval_steps": 2},
    "with an auxiliary loss": {"family": "mixtral", "max_grad_norm": 0.3},
    "not clipped, state from the start": {"max_grad_norm": 0.0, "optim": "adagrad"},
    "activations checkpointed": {CHECKPOINTING: True},
    "an optimizer of the user's": {"own_optimizer": True},
    "a model made by the trainer": {"model_init": True},
    "a module of the user's": {"family": "module"},
    # Adam would make whole steps of what rounds to another sign.
    "bf16": {"bf16": True, "optim": "sgd"},
    "fp16": {"fp16": True, "optim": "sgd"},
}


def train_with_and_without(folder: str) -> dict[str, Any]:
    outcomes: dict[str, Any] = {}
    for case, options in CASES.items():
        plain, ours = trainer(folder, ours=False, **options), trainer(folder, **options)
        plain.train()
        placements: set[str] = set()
        ours.add_callback(each_step(lambda made=ours, seen=placements: seen.add(str(made.engine.placements))))
        ours.train()
        outcomes[case] = result(plain), result(ours), len(placements)
    plain, ours = trainer(folder, ours=False), trainer(folder)
    # The plain one would go on without DDP after this, each process alone (transformers 5.24).
    ours.evaluate()
    for made in (plain, ours):
        made.train()
        made.train()
    outcomes["evaluated before, trained twice"] = result(plain), result(ours), STEPS
    predictions = [made.predict(rows(50, 7)).predictions for made in (plain, ours)]
    return {"outcomes": outcomes, "predictions": [torch.as_tensor(values) for values in predictions]}


def each_step(call: Any) -> Any:
    from transformers import TrainerCallback

    class Each(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            call()

    return Each()


def test_two_ranks_train_evaluate_and_predict_like_the_plain_trainer_under_ddp(tmp_path: Path) -> None:
    for actual in run_ranks(train_with_and_without, 2, str(tmp_path), init=False, timeout_s=120):
        for case, (plain, ours, num_placements) in actual["outcomes"].items():
            # What 8 and 11 bits of a mantissa round.
            same(case, ours, plain, tolerance={"bf16": 2e-2, "fp16": 2e-3}.get(case, 1e-4))
            skipped = sum(not math.isfinite(norm) for norm in ours["grad_norm"])
            assert num_placements > (STEPS - skipped) // 2, case
            assert (skipped > 0) == (case == "fp16")
            assert len(plain["loss"]) >= STEPS
        assert len(actual["outcomes"]["evaluated in between"][0]["eval_loss"]) == STEPS // 2
        plain, ours = actual["predictions"]
        assert plain.shape == (7, hf_models.LENGTH, hf_models.VOCABULARY)
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


SAVES: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "gradient_accumulation_steps": 2,
}
# Written with a tensor for each expert, which the plain Trainer does not read back (it warns of missing keys); with
# fused experts, which it does; and by safetensors alone.
RESUMES = [
    ("qwen3_moe", True, True),
    ("qwen3_moe", False, True),
    ("gpt_oss", True, True),
    ("gpt_oss", True, False),
    ("gpt_oss", False, True),
    ("module", True, True),
    ("module", True, False),
]


def train_and_resume(folder: str) -> dict[str, Any]:
    """Runs that go on from the checkpoints of others, and those that were never interrupted."""
    outcomes: dict[str, Any] = {}
    for family, saver in sorted({(family, saver) for family, saver, _ in RESUMES}):
        made = trainer(f"{folder}/{family}/{saver}", family=family, ours=saver, **SAVES)
        made.train()
        outcomes[family, saver] = result(made)
    for family, saver, loader in RESUMES:
        # Other initial values: all must come from the checkpoint.
        made = trainer(f"{folder}/again", family=family, ours=loader, seed=1, **SAVES)
        made.train(resume_from_checkpoint=f"{folder}/{family}/{saver}/checkpoint-2")
        outcomes[family, saver, loader] = result(made)
    for ours in (False, True):
        # The greatest loss, so that the last is not the best.
        options = {**SAVES, "load_best_model_at_end": True, "greater_is_better": True}
        made = trainer(f"{folder}/best", family="gpt_oss", ours=ours, **options)
        made.train()
        outcomes["best", ours] = {**result(made), "best": made.state.best_global_step}
    made = trainer(f"{folder}/saved")
    made.train()
    made.save_model(f"{folder}/saved")
    with torch.no_grad():
        outcomes["logits"] = made.model.eval()(hf_models.tokens(60)).logits
    return outcomes


def resume_alone(folder: str) -> dict[str, Any]:
    """On one process, with the global batches of two: from their checkpoint, from the start, and without us."""
    options = {**SAVES, "per_device_train_batch_size": 4}
    resumed, alone, plain = (
        trainer(f"{folder}/{name}", ours=name != "plain", **options) for name in ("r", "a", "plain")
    )
    resumed.train(resume_from_checkpoint=f"{folder}/qwen3_moe/True/checkpoint-2")
    alone.train()
    plain.train()
    return {name: result(made) for name, made in [("resumed", resumed), ("alone", alone), ("plain", plain)]}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="transformers' Trainer cannot resume ranks on the CPU"
)
def test_a_run_that_resumes_is_one_that_never_stopped_and_checkpoints_are_ordinary(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for outcomes in run_ranks(train_and_resume, 2, str(tmp_path), init=False, timeout_s=120):
        for family, saver, loader in RESUMES:
            same((family, saver, loader), outcomes[family, saver, loader], outcomes[family, saver])
        same("best", outcomes["best", True], outcomes["best", False])
        assert outcomes["best", True]["best"] == outcomes["best", False]["best"] < STEPS
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert not any(isinstance(module, sml.Experts) for module in loaded.modules())
        with torch.no_grad():
            torch.testing.assert_close(loaded(hf_models.tokens(60)).logits, outcomes["logits"], rtol=1e-4, atol=1e-4)
    optimizer = torch.load(tmp_path / "qwen3_moe/True/checkpoint-2/optimizer.pt", weights_only=True)
    assert any(tuple(value["exp_avg"].shape) == (5, 24, 16) for value in optimizer["state"].values())

    (alone,) = run_ranks(resume_alone, 1, str(tmp_path))
    same("one process", alone["alone"], alone["plain"])
    # The first is of the two ranks, whose batches have other means.
    for name in ("resumed", "plain"):
        del alone[name]["eval_loss"][0]
    same("from two ranks to one process", alone["resumed"], alone["plain"])
