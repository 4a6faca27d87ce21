"""Experts in the CPU's memory and slots that are freed, under every framework, on one rank and on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

import swiftmoe_lightning as sml
from tests.accelerate import test_prepare as test_accelerate
from tests.engine.models import RandomPolicy
from tests.helpers import nightly, run_ranks
from tests.huggingface import test_trainer as test_hf_trainer
from tests.strategies import cases, test_fabric
from tests.strategies.test_fully_sharded import Blocks

BIG: dict[str, Any] = {"offload_optimizer": True, "reshard_after_forward": True, "placement": RandomPolicy}
Outcome = dict[str, Tensor]


def lightning(world_size: int, folder: str) -> tuple[Outcome, Outcome]:
    """The state after a fit that validates and accumulates, plain (over ranks, whole experts) and big."""
    states = []
    for strategy in ("auto" if world_size == 1 else "swiftmoe", sml.SwiftMoEStrategy(**BIG)):
        model = Blocks()
        runner = cases.trainer(world_size, strategy, accumulate_grad_batches=2, gradient_clip_val=0.1)
        runner.fit(model, cases.loader(world_size), cases.loader(world_size, cases.GLOBAL_BATCH))
        states.append(cases.whole(model))
    assert isinstance(model.moe.experts.down_proj, DTensor)
    return states[0], states[1]


def fabric(world_size: int, folder: str) -> tuple[Outcome, Outcome]:
    strategy: Any = sml.SwiftMoEFabricStrategy(**BIG)
    plain, big = (test_fabric.Loop(each, world_size=world_size, accumulation=2)() for each in ("ddp", strategy))
    return plain["state"], big["state"]


def accelerate(world_size: int, folder: str) -> tuple[Outcome, Outcome]:
    plain, big = test_accelerate.Loop(ours=False, clip_norm=0.3), test_accelerate.Loop(clip_norm=0.3, save=folder)
    big.config = sml.SwiftMoEConfig(**BIG)
    states = plain()["state"], big()["state"]
    again = test_accelerate.Loop(skip=test_accelerate.STEPS, load=folder)
    again.config = big.config
    test_accelerate.close(again()["state"], states[0])
    return states


def trainer(world_size: int, folder: str) -> tuple[Outcome, Outcome]:
    options = {"max_grad_norm": 0.5, "eval_strategy": "steps", "eval_steps": 2}
    plain, big = (test_hf_trainer.trainer(folder, ours=ours, **options) for ours in (False, True))
    big._swiftmoe_config = sml.SwiftMoEConfig(**BIG)
    for made in (plain, big):
        made.train()
    assert big.engine.layers
    return test_hf_trainer.result(plain)["state"], test_hf_trainer.result(big)["state"]


@pytest.mark.parametrize(
    ("host", "world_size"),
    [
        (lightning, 1),
        (accelerate, 1),
        *nightly((fabric, 1), (trainer, 1), (lightning, 2), (fabric, 2), (accelerate, 2), (trainer, 2)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_framework_trains_the_same(host: Any, world_size: int, tmp_path: Any) -> None:
    for plain, big in run_ranks(host, world_size, world_size, str(tmp_path), init=False):
        assert plain.keys() == big.keys()
        for name, value in plain.items():
            torch.testing.assert_close(big[name], value, rtol=1e-4, atol=1e-5, msg=name)
