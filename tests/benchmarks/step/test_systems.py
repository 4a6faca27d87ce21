"""Every system that drops nothing trains as one process does, on routes that are equal."""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

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


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Losses of one process that has both ranks' batches and routes, and no system."""
    models = []
    for rank in range(NUM_RANKS):
        with patch.object(dist, "get_rank", lambda rank=rank: rank):
            models.append(Model(WORKLOAD))
    first, second = models
    optimizer, losses = optimizer_of(first.parameters()), []
    for _ in range(comparison.WARM_UP_STEPS):
        second.load_state_dict(first.state_dict())
        loss = torch.stack([next_byte_loss(model, model.batch_BT) for model in models]).mean()
        for model in models:
            model.zero_grad()
        loss.backward()
        for parameter, other in zip(first.parameters(), second.parameters(), strict=True):
            parameter.grad += other.grad
        optimizer.step()
        losses.append(loss.item())
    return losses


def _train(name: str) -> list[float]:
    return comparison.prepare(name, WORKLOAD, None)[1]


@pytest.mark.parametrize("name", [name for name in INSTALLED if not SYSTEMS[name].drops])
def test_trains_as_one_process_does(name: str, expected: list[float]) -> None:
    assert run_ranks(_train, NUM_RANKS, name)[0] == pytest.approx(expected, abs=1e-5)
    assert expected[0] > expected[-1]


def _prepare(name: str, expected: list[float]) -> Any:
    system, _ = comparison.prepare(name, WORKLOAD, expected)
    return system.engine.config.replace_every


def test_the_frozen_placement_is_kept(expected: list[float]) -> None:
    assert run_ranks(_prepare, NUM_RANKS, FROZEN, expected)[0] > 10**9


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
