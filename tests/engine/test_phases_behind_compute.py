"""Collect runs inside backward and distribute ahead of forward, whichever layers a batch reaches, and in what order."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine import direct_exchange
from swiftmoe_lightning.engine.checkpoint import full_state
from swiftmoe_lightning.engine.slots import ExpertSlots
from tests.engine import models
from tests.helpers import nightly, rank_errors, run_ranks

DIM, NUM_LAYERS = 6, 5


class Tower(nn.Module):
    """Blocks x + moe(x), of which each forward runs some, in any order; one in `saved` recomputes in backward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            [sml.MoE(DIM, 5 + index, 4, 2, activation="gelu", bias=index == 1) for index in range(NUM_LAYERS)]
        )

    def forward(self, x: Tensor, order: list[int], saved: dict[int, bool]) -> Tensor:
        for index in order:
            block = self.blocks[index]
            # Reentrant checkpointing needs an input that requires a gradient.
            x = x + (checkpoint(block, x, use_reentrant=saved[index]) if index in saved else block(x))
        return x


class Run:
    """A training run on one process, or on this rank's part of every batch."""

    def __init__(self, size: int | None = None, **options: Any) -> None:
        self.is_spread = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if self.is_spread else (0, 1)
        self.tower = Tower().to(torch.float64)
        config = {"placement": models.RandomPolicy, "expert_parallel_size": size, **options}
        self.engine = sml.SwiftMoEEngine(self.tower, sml.SwiftMoEConfig(**config))
        optimizer = torch.optim.AdamW(self.tower.parameters(), lr=1e-2, eps=1e-4)
        self.optimizer = self.engine.prepare_optimizer(optimizer)
        self.number = 0

    def loss(self, order: list[int], saved: dict[int, bool] | None = None) -> Tensor:
        self.number += 1
        whole = torch.randn(24, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(self.number))
        x = models.my_part(whole, self.rank, self.world_size).requires_grad_()
        return self.tower(x, order, saved or {}).square().mean()

    def micro(self, order: list[int], saved: dict[int, bool] | None = None, waits: bool = False) -> None:
        with self.engine.no_sync() if waits else nullcontext():
            self.loss(order, saved).backward()

    def evaluate(self, order: list[int], stale: bool = False) -> None:
        if stale:
            self.engine.mark_stale()
        with torch.no_grad():
            self.loss(order)

    def step(self) -> None:
        if self.is_spread:
            for name, parameter in self.tower.named_parameters():
                if "experts" not in name and parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= self.world_size
        self.engine.clip_grad_norm_(0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()


ALL = list(range(NUM_LAYERS))
STEPS: dict[str, list[tuple[Any, ...]]] = {
    "all layers": [("micro", ALL), ("step",)] * 2,
    "the other way round": [("micro", ALL[::-1]), ("step",), ("micro", ALL), ("step",)],
    "layers that only some micro-batches reach": [
        ("micro", [0, 2, 4], {}, True),
        ("micro", [1, 2], {}),
        ("step",),
        ("micro", [3], {}, True),
        ("micro", ALL),
        ("step",),
    ],
    "a layer that runs twice": [("micro", [0, 3, 0, 1]), ("step",), ("micro", [2, 2, 2]), ("step",)],
    "checkpointing": [
        ("micro", ALL, {1: False, 2: True, 3: True}),
        ("step",),
        ("micro", [0, 1, 1, 4], {0: True, 1: True}),
        ("step",),
    ],
    "evaluation between, of some layers": [
        ("micro", ALL),
        ("step",),
        ("evaluate", [0, 4]),
        ("evaluate", [2], True),
        ("micro", ALL),
        ("step",),
        ("evaluate", ALL, True),
    ],
    "steps in a row": [
        ("micro", ALL),
        ("step",),
        ("micro", [4]),
        ("step",),
        ("step",),
        ("micro", ALL[::-1]),
        ("step",),
    ],
}


def run_all(size: int | None, least_message: int) -> dict[str, dict[str, Tensor]]:
    final = {}
    with patch.object(direct_exchange, "_LEAST_MESSAGE", least_message):
        for name, events in STEPS.items():
            run = Run(size)
            for method, *arguments in events:
                getattr(run, method)(*arguments)
            final[name] = full_state({"model": run.tower.state_dict()}, keep=True)["model"]
    return final


@pytest.mark.parametrize("least_message", [0, 10**9], ids=["direct", "packed"])
@pytest.mark.parametrize(("world_size", "size"), [(2, None), *nightly((3, None)), (4, 2)])
def test_any_order_of_layers_equals_one_process(world_size: int, size: int | None, least_message: int) -> None:
    expected = run_all(None, least_message)
    for actual in run_ranks(run_all, world_size, size, least_message):
        for name, state in expected.items():
            wrong = [
                key
                for key, value in state.items()
                if not torch.allclose(actual[name][key], value, rtol=1e-9, atol=1e-12)
            ]
            assert not wrong, (name, wrong)


def events_of_two_steps() -> list[str]:
    run, events = Run(), []
    for index, block in enumerate(run.tower.blocks):
        block.register_forward_pre_hook(lambda *_, i=index: events.append(f"forward {i}"))
        block.register_full_backward_pre_hook(lambda *_, i=index: events.append(f"backward {i}"))
    index_of = {id(layer.slots): layer.index for layer in run.engine.layers}
    start_collection, start_distribution = ExpertSlots.start_collection, ExpertSlots.start_distribution

    def collect(slots: ExpertSlots) -> Any:
        started = start_collection(slots)
        if started is not None:
            events.append(f"collect {index_of[id(slots)]}")
        return started

    def distribute(slots: ExpertSlots, allows_writes: bool) -> bool:
        events.append(f"distribute {index_of[id(slots)]}")
        return start_distribution(slots, allows_writes)

    run.micro(ALL)
    run.step()
    run.engine.wait_for_weights()
    events.clear()
    with (
        patch.object(ExpertSlots, "start_collection", collect),
        patch.object(ExpertSlots, "start_distribution", distribute),
    ):
        run.micro(ALL)
        run.step()
        events.append("step")
        run.loss(ALL)
    return events


def test_gradients_leave_in_backward_and_weights_two_layers_ahead_of_forward() -> None:
    first = [f"forward {i}" for i in ALL]
    backward = [event for i in ALL[::-1] for event in (f"backward {i}", f"collect {i}")]
    second = ["distribute 0", "distribute 1", "step"]
    second += ["forward 0", "distribute 2", "forward 1", "distribute 3", "forward 2", "distribute 4"]
    second += ["forward 3", "forward 4"]
    assert run_ranks(events_of_two_steps, 2) == [first + backward + second] * 2


def most_gradients() -> int:
    """The most layers whose gradients are in slots or leave them when backward reaches a layer: before it adds its."""
    run, most = Run(), 0
    layers = run.engine.layers

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(layer.holds_gradients() and not layer.gradients._totals for layer in layers))

    run.micro(ALL)
    run.step()
    for block in run.tower.blocks:
        block.register_full_backward_pre_hook(count)
    run.micro(ALL)
    count()
    return most


def test_gradients_of_two_layers_are_held_in_backward() -> None:
    assert run_ranks(most_gradients, 2) == [1, 1]


def backward_after_new_weights() -> None:
    """The placement stays, and its object with it; the weights do not."""
    run = Run(replace_every=100)
    early = run.loss(ALL)
    run.micro(ALL)
    run.step()
    run.loss(ALL)
    early.backward()


def test_backward_through_weights_that_were_replaced_is_an_error() -> None:
    for error in rank_errors(backward_after_new_weights, 2):
        assert "backward through a forward from before the last optimizer step" in error


def write_before_the_weights_left(layer: int) -> None:
    run = Run()
    run.micro(ALL)
    run.step()
    with torch.no_grad():
        run.tower.blocks[layer].experts.down_proj.mul_(2)
    run.loss(ALL)


@pytest.mark.parametrize("layer", [0, NUM_LAYERS - 1])
def test_a_write_is_seen_whether_the_weights_have_left_or_wait(layer: int) -> None:
    for error in rank_errors(write_before_the_weights_left, 2, layer):
        assert "the experts' weights were written since they were last sent to their slots" in error
