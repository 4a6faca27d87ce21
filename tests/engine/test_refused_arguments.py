"""Arguments that cannot be meant: refused where they are given, with their value and the fix."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import swiftmoe_lightning as sml
from tests.helpers import run_ranks

DIM, E = 8, 3


def block() -> nn.Module:
    return sml.MoE(DIM, 4, E)


@pytest.mark.parametrize("config", [{"slots_per_rank": 2}, "balanced", 0, sml.SwiftMoEConfig])
def test_a_config_of_another_type_is_refused(config: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"config must be a SwiftMoEConfig, got {config!r}. Write")):
        sml.SwiftMoEEngine(block(), config)


@pytest.mark.parametrize("ranks", [0, -1, 1.5, "2", True])
def test_ranks_per_node_below_one_are_refused(ranks: Any) -> None:
    with pytest.raises(ValueError, match=f"ranks_per_node must be a whole number of 1 or more, got {ranks!r}"):
        sml.SwiftMoEEngine(block(), ranks_per_node=ranks)


def ranks_per_node() -> list[int]:
    groups = [sml.SwiftMoEEngine(block(), ranks_per_node=ranks).group for ranks in (1, None)]
    return [0 if group is None else group.ranks_per_node for group in groups]


def test_ranks_of_a_node_are_those_that_are_given_else_the_launchers() -> None:
    assert run_ranks(ranks_per_node, 2) == [[1, 2]] * 2


def test_an_optimizer_of_foreign_parameters_is_refused() -> None:
    module, other = block(), nn.Linear(2, 2)
    engine = sml.SwiftMoEEngine(module)
    with pytest.raises(ValueError, match="none of the optimizer's 2 parameters belongs to the engine's MoE, whose"):
        engine.prepare_optimizer(torch.optim.SGD(other.parameters(), lr=0.1))
    # One for two models is nobody's mistake.
    engine.prepare_optimizer(torch.optim.SGD([*other.parameters(), *module.parameters()], lr=0.1))


def test_without_experts_any_optimizer_will_do() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    assert sml.SwiftMoEEngine(nn.Linear(2, 2)).prepare_optimizer(optimizer) is optimizer


@pytest.mark.parametrize("limit", [float("nan"), -1.0, "1", None, True])
def test_clip_limits_that_are_no_number_are_refused(limit: Any) -> None:
    engine = sml.SwiftMoEEngine(block())
    with pytest.raises(ValueError, match=rf"max_norm must be a number of 0 or more, got {limit!r}\. Use 1\.0"):
        engine.clip_grad_norm_(limit)
    with pytest.raises(ValueError, match=rf"clip_value must be a number of 0 or more, got {limit!r}\. Use 1\.0"):
        engine.clip_grad_value_(limit)


@pytest.mark.parametrize("limit", [float("inf"), torch.tensor(1e9), 10**6])
@pytest.mark.parametrize("norm_type", [2, float("inf")])
def test_limits_that_torch_takes_are_taken(limit: Any, norm_type: float) -> None:
    module = block()
    engine = sml.SwiftMoEEngine(module)
    module(torch.ones(4, DIM)).sum().backward()
    before = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert engine.clip_grad_norm_(limit, norm_type) > 0
    after = [p.grad for p in module.parameters() if p.grad is not None]
    assert len(after) > 2
    torch.testing.assert_close(after, before)


def test_a_saved_placement_that_lacks_something_is_named() -> None:
    engine = sml.SwiftMoEEngine(sml.MoE(4, 3, 2))
    state = engine.state_dict()
    del state["experts"]["num_steps"]
    with pytest.raises(ValueError, match=r"the placement of 'experts' lacks \['num_steps'\]"):
        engine.load_state_dict(state)


def test_experts_under_two_routers_are_refused_and_under_one_are_not() -> None:
    first, second = (sml.MoE(4, 3, 2) for _ in range(2))
    second.experts = first.experts
    model = torch.nn.ModuleList([first, second])
    with pytest.raises(ValueError, match=r"the experts of '1' are also those of a block with another router"):
        sml.SwiftMoEEngine(model)
    second.router = first.router
    assert list(sml.SwiftMoEEngine(model).placements) == ["0.experts"]
