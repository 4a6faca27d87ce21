"""Accelerate's own test scripts of training loops, with our `prepare` in place of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.test_utils import RegressionModel
from torch import Tensor, nn
from torch.optim import Optimizer

import swiftmoe_lightning as sml
from tests.helpers import run_ranks


class Ours(Accelerator):
    """`prepare` of a model is ours; the scripts give objects in any order, and not always an optimizer."""

    num_prepared = 0

    def __init__(self, **options: Any) -> None:
        super().__init__(cpu=True, **options)

    def prepare(self, *objects: Any, **options: Any) -> Any:
        models = [o for o in objects if isinstance(o, nn.Module)]
        if not models:
            return super().prepare(*objects, **options)
        (model,) = models
        optimizers = [o for o in objects if isinstance(o, Optimizer)] or [torch.optim.SGD(model.parameters())]
        rest = [o for o in objects if o is not model and o is not optimizers[0]]
        before = [model, optimizers[0], *rest]
        after = sml.accelerate.prepare(self, *before)
        Ours.num_prepared += 1
        return tuple(after[[b is o for b in before].index(True)] for o in objects)


class RegressionMoE(RegressionModel):  # type: ignore[misc]
    """The scripts' model with experts beside its line."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        random = torch.get_rng_state()
        torch.manual_seed(0)
        self.moe = sml.MoE(dim=4, hidden_dim=6, num_experts=3, top_k=2)
        torch.set_rng_state(random)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        line: Tensor = super().forward(x)
        return line + 0.1 * self.moe(x.unsqueeze(-1) * torch.linspace(-1, 1, 4)).sum(-1)


def run_script(script: str, function: str, takes_accelerator: bool, model: Callable[..., nn.Module]) -> int:
    """How many models the script had prepared."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    module = importlib.import_module(f"accelerate.test_utils.scripts.{script}")
    module.Accelerator, module.RegressionModel = Ours, model
    if model is RegressionMoE:
        # A line has no matmul that bf16 would round; experts have.
        module.is_bf16_available = lambda: False
    accelerator = Ours()
    getattr(module, function)(*[accelerator] * takes_accelerator)
    return Ours.num_prepared


@pytest.mark.parametrize(
    ("script", "function", "takes_accelerator", "model"),
    [
        ("test_script", "training_check", False, RegressionModel),
        ("test_script", "training_check", False, RegressionMoE),
        ("test_sync", "test_distributed_sync", True, RegressionModel),
        ("test_sync", "test_distributed_sync_multiple_fwd", True, RegressionModel),
        ("test_sync", "test_gradient_accumulation", False, RegressionModel),
        ("test_sync", "test_gradient_accumulation_with_opt_and_scheduler", False, RegressionModel),
    ],
)
def test_the_script_passes(script: str, function: str, takes_accelerator: bool, model: Any) -> None:
    for num_prepared in run_ranks(run_script, 2, script, function, takes_accelerator, model, init=False):
        assert num_prepared >= 1
