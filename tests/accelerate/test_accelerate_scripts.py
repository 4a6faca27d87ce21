"""Accelerate's own test scripts for training loops, as they are installed, with our `prepare` for Accelerate's.

Each runs on 2 ranks with the model it was written for, which has no experts, and with one of experts in its place.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import swiftmoe_lightning as sml
from tests.engine.models import RandomPolicy
from tests.helpers import nightly, run_ranks

FOLDER = "accelerate.test_utils.scripts"
NUM_SPREAD: list[int] = []


class Ours(Accelerator):
    """What a user of our `prepare` writes, where a script writes `accelerator.prepare(...)`."""

    def prepare(self, *objects: Any, **options: Any) -> Any:
        model = next((x for x in objects if isinstance(x, nn.Module)), None)
        if model is None:
            return super().prepare(*objects, **options)
        optimizer = next((x for x in objects if isinstance(x, torch.optim.Optimizer)), None)
        # Some scripts only look at gradients.
        given = torch.optim.SGD(model.parameters()) if optimizer is None else optimizer
        rest = [x for x in objects if x is not model and x is not optimizer]
        config = sml.SwiftMoEConfig(slots_per_rank=3, placement=RandomPolicy)
        prepared = sml.accelerate.prepare(self, model, given, *rest, config=config)
        assert isinstance(prepared[0], DistributedDataParallel)
        NUM_SPREAD.append(len(prepared[0].engine.layers))
        by_id = {id(x): y for x, y in zip([model, given, *rest], prepared, strict=True)}
        return by_id[id(objects[0])] if len(objects) == 1 else tuple(by_id[id(x)] for x in objects)


class Routed(nn.Module):
    """In place of `RegressionModel`, with its parameters; the same weights whenever it is made."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.a, self.b = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
            self.moe = sml.MoE(dim=4, hidden_dim=6, num_experts=4, top_k=2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[:, None].to(self.a.dtype) * self.a + self.b
        return (hidden + self.moe(hidden)).mean(-1)


class WholeGradients:
    """`torch` for the scripts that compare gradients: experts' are whole where they have been collected."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def allclose(alone: Tensor, spread: Tensor | None, **tolerance: float) -> bool:
        if spread is None:
            return False
        spread = spread.full_tensor() if hasattr(spread, "full_tensor") else spread
        # Sums over ranks are rounded another way.
        return torch.allclose(alone, spread, **{"atol": 1e-6, **tolerance})


def script(name: str, experts: bool) -> Any:
    """The installed script, with our Accelerator in it, and a model of experts if asked."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    module: Any = importlib.import_module(f"{FOLDER}.{name}")
    module.Accelerator = Ours
    if experts:
        module.RegressionModel, module.torch = Routed, WholeGradients()
    return module


def spread(experts: bool) -> bool:
    """Whether every model that was prepared had its experts spread, if it has any."""
    return bool(NUM_SPREAD) and set(NUM_SPREAD) == {int(experts)}


def check_training(experts: bool) -> bool:
    test = script("test_script", experts)
    if experts:
        # Two more sums over ranks in each of 24 steps than the script's models have.
        test.ATOL = test.RTOL = 1e-5
        # In bfloat16 experts round, which this script's float32 parameters do not.
        test.is_bf16_available = lambda: False
    Ours()
    for seedable in (False, True):
        test.training_check(use_seedable_sampler=seedable)
    return spread(experts)


def check_sync(experts: bool) -> bool:
    test = script("test_sync", experts)
    test.test_distributed_sync(Ours())
    test.test_distributed_sync_multiple_fwd(Ours())
    for sync_each_batch in (False, True):
        for split_batches in (False, True):
            test.test_gradient_accumulation(split_batches, False, sync_each_batch)
        # Not with split_batches: its reference steps on half a gradient, and is far off in 5 steps.
        test.test_gradient_accumulation_with_opt_and_scheduler(False, False, sync_each_batch)
    test.test_dataloader_break()
    return spread(experts)


def check_metrics(experts: bool) -> bool:
    # It imports two packages for data of the hub, which these functions do not touch.
    stubs = {name: ModuleType(name) for name in ("datasets", "evaluate")}
    vars(stubs["datasets"])["load_dataset"] = None
    with patch.dict(sys.modules, stubs):
        test = script("external_deps.test_metrics", experts)
    for number in (99, 512):
        test.test_torch_metrics(Ours(), number)
    test.test_gather_for_metrics_drop_last()
    return spread(experts)


class OnCpu(DistributedDataParallel):
    """The script's reference asks for GPUs by number."""

    def __init__(self, module: nn.Module, **_: Any) -> None:
        super().__init__(module)


def check_communication_hooks(experts: bool) -> bool:
    test = script("test_ddp_comm_hook", experts)
    kinds = test.DDPCommunicationHookType
    # The bfloat16 ones need a GPU.
    cases = [
        (kinds.NO, kinds.NO),
        (kinds.FP16, kinds.NO),
        (kinds.POWER_SGD, kinds.FP16),
        (kinds.BATCHED_POWER_SGD,) * 2,
    ]
    with patch.object(torch.nn.parallel, "DistributedDataParallel", OnCpu):
        for hook, wrapper in cases:
            test.test_ddp_comm_hook(hook, wrapper, {})
    return spread(experts)


@pytest.mark.parametrize(
    ("check", "experts"),
    [
        *nightly((check_training, False)),
        (check_training, True),
        *nightly((check_sync, False)),
        (check_sync, True),
        (check_communication_hooks, False),
        *nightly((check_metrics, False)),
        (check_metrics, True),
    ],
)
def test_scripts_of_accelerate_pass(check: Callable[[bool], bool], experts: bool) -> None:
    assert run_ranks(check, 2, experts, init=False) == [True, True]
