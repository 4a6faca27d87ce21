"""Every system that drops nothing trains as one process does, on routes that are equal."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.step import comparison
from benchmarks.step.deepspeed_peer import DeepSpeedMoE
from benchmarks.step.systems import FROZEN, OURS, SYSTEMS
from benchmarks.step.workload import Model, Sizes, Workload, optimizer_of
from swiftmoe_lightning.demo.gpt import next_byte_loss
from tests.helpers import rank_errors, run_ranks

WORKLOAD = Workload(Sizes(layers=2, dim=32, hidden_dim=32, experts=4, top_k=2, tokens=64), "zipf")
NUM_RANKS = 2
INSTALLED = [name for name, builder in SYSTEMS.items() if builder.is_installed]


def _losses_on_one_process() -> list[float]:
    """Every rank has both ranks' batches and routes, and no system."""
    models = []
    own_rank = dist.get_rank
    for rank in range(NUM_RANKS):
        dist.get_rank = lambda rank=rank: rank
        models.append(Model(WORKLOAD))
    dist.get_rank = own_rank
    optimizer, losses = optimizer_of(models[0].parameters()), []
    for _ in range(comparison.WARM_UP_STEPS):
        optimizer.zero_grad()
        models[1].load_state_dict(models[0].state_dict())
        models[1].zero_grad()
        both = [next_byte_loss(model, model.batch_BT) for model in models]
        sum(both).backward()
        for parameter, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            parameter.grad.add_(other.grad).div_(NUM_RANKS)
        optimizer.step()
        losses.append(float(sum(both)) / NUM_RANKS)
    return losses


def _train(name: str) -> tuple[list[float], list[float]]:
    return comparison.prepare(name, WORKLOAD, None)[1], _losses_on_one_process()


@pytest.mark.parametrize("name", [name for name in INSTALLED if not SYSTEMS[name].drops])
def test_trains_as_one_process_does(name: str) -> None:
    (losses, expected), *_ = run_ranks(_train, NUM_RANKS, name)
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[0] > losses[-1]


def _prepare(name: str, expected: list[float]) -> Any:
    system, _ = comparison.prepare(name, WORKLOAD, expected)
    return system.engine.config.replace_every


def test_the_frozen_placement_is_kept() -> None:
    losses = run_ranks(_train, NUM_RANKS, OURS)[0][0]
    assert run_ranks(_prepare, NUM_RANKS, FROZEN, losses)[0] > 10**9


def test_a_system_that_trains_otherwise_is_an_error_on_every_rank() -> None:
    for error in rank_errors(_prepare, NUM_RANKS, OURS, [1.0, 1.0, 1.0]):
        assert "balanced trains otherwise: losses [" in error


def test_routing_that_is_not_the_drawn_one_is_found() -> None:
    layer = DeepSpeedMoE.__new__(DeepSpeedMoE)
    torch.nn.Module.__init__(layer)
    layer._drawn_TK = torch.tensor([[0, 2], [2, 1]])
    layer.layer = torch.nn.Module()
    layer.layer.deepspeed_moe = torch.nn.Module()
    layer.layer.deepspeed_moe.exp_counts = torch.tensor([1, 1, 2])
    layer.check_routing()
    layer.layer.deepspeed_moe.exp_counts = torch.tensor([2, 1, 1])
    with pytest.raises(AssertionError, match=re.escape("routed [2, 1, 1] tokens to the experts, and [1, 1, 2]")):
        layer.check_routing()


def test_what_is_not_installed_is_known() -> None:
    builder = SYSTEMS[OURS]
    assert builder.is_installed
    assert not type(builder)(builder.make, needs="no_such_package.inside").is_installed
