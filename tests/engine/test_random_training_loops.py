"""Training loops of any shape: whatever they run, skip, discard or raise, 2 ranks equal one process."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.checkpoint import full_state
from tests.engine import dense, models
from tests.helpers import rank_errors, run_ranks


class Loop:
    """The events of a training loop, on one process or on this rank's part of every batch."""

    def __init__(self, **options: Any) -> None:
        self.is_spread = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if self.is_spread else (0, 1)
        self.module = models.build(torch.float64)
        slots = 4 if self.is_spread else None
        config = sml.SwiftMoEConfig(slots_per_rank=slots, placement=models.RandomPolicy, **options)
        self.engine = sml.SwiftMoEEngine(self.module, config)
        self.optimizer = self.engine.prepare_optimizer(torch.optim.AdamW(self.module.parameters(), lr=1e-2, eps=1e-4))
        self.num_batches = 0
        self.saved = self.state()

    def loss(self) -> Tensor:
        self.num_batches += 1
        whole = dense.batch(self.num_batches, 0, torch.float64)
        x, target = (models.my_part(t, self.rank, self.world_size) for t in whole)
        return F.mse_loss(self.module(x), target)

    def micro(self) -> None:
        self.loss().backward()

    def waiting(self) -> None:
        with self.engine.no_sync():
            self.micro()

    def twice(self) -> None:
        loss = self.loss()
        loss.backward(retain_graph=True)
        loss.backward()

    def waiting_then_not(self) -> None:
        loss = self.loss()
        with self.engine.no_sync():
            loss.backward(retain_graph=True)
        loss.backward()

    def failing(self, layer: int, syncs: bool = True) -> None:
        """A backward that an exception ends, once the layers behind `layer` have their gradients."""
        handle = self.module[layer].register_forward_hook(lambda _, __, out: Explode.apply(out))
        with nullcontext() if syncs else self.engine.no_sync(), pytest.raises(ZeroDivisionError):
            self.micro()
        handle.remove()

    def forget(self) -> None:
        """A forward that nobody runs back."""
        self.loss()

    def evaluate(self) -> None:
        with torch.no_grad():
            self.loss()

    def zero(self) -> None:
        self.optimizer.zero_grad()

    def zero_in_place(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def drop(self) -> None:
        for parameter in self.module.parameters():
            parameter.grad = None

    def step(self) -> None:
        if self.is_spread:
            for name, parameter in self.module.named_parameters():
                if "experts" not in name and parameter.grad is not None:
                    dist.all_reduce(parameter.grad, dist.ReduceOp.SUM)
                    parameter.grad /= self.world_size
        self.engine.clip_grad_norm_(0.5)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        state = full_state({"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, keep=True)
        return copy.deepcopy({**state, "engine": self.engine.state_dict()})

    def save(self) -> None:
        self.saved = self.state()

    def load(self) -> None:
        saved = copy.deepcopy(self.saved)
        self.module.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.engine.load_state_dict(saved["engine"])

    def run(self, events: list[str]) -> None:
        for event in events:
            name, _, arguments = event.partition(":")
            getattr(self, name)(*([int(a) for a in arguments.split(",")] if arguments else []))


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ZeroDivisionError


def run_loops(loops: list[list[str]], options: dict[str, Any]) -> list[dict[str, Tensor]]:
    actual = []
    for events in loops:
        loop = Loop(**options)
        loop.run(events)
        actual.append(loop.state()["model"])
    return actual


BETWEEN = [
    "waiting",
    "twice",
    "waiting_then_not",
    "forget",
    "evaluate",
    "zero",
    "zero_in_place",
    "drop",
    "save",
    "load",
]
BETWEEN += [f"failing:{layer},{syncs}" for layer in (0, 1) for syncs in (0, 1)]
STEPS = st.builds(
    lambda between, after: [*between, "micro", "step", *after],
    st.lists(st.sampled_from(BETWEEN), max_size=4),
    st.lists(st.sampled_from(["zero", "zero_in_place", "drop", "evaluate", "save", "load"]), max_size=2),
)
LOOPS = st.lists(STEPS, min_size=2, max_size=4).map(lambda steps: [event for step in steps for event in step])


def check(loops: list[list[str]], **options: Any) -> None:
    expected = run_loops(loops, {})
    for actual in run_ranks(run_loops, 2, loops, options):
        for events, state, expected_state in zip(loops, actual, expected, strict=True):
            wrong = [
                n for n, value in expected_state.items() if not torch.allclose(state[n], value, rtol=1e-9, atol=1e-11)
            ]
            assert not wrong, (events, wrong)


STEP = ["micro", "step", "zero"]
CASES = {
    "a discarded micro-batch": ["waiting", "zero", *STEP, *STEP],
    "zeroed in place": ["waiting", "zero_in_place", *STEP, *STEP],
    "gradients set to None": ["waiting", "drop", *STEP, *STEP],
    "discarded beside a gradient": ["micro", "waiting", "zero_in_place", *STEP],
    "an exception, retried": ["failing:0,1", "zero", *STEP, "failing:1,1", "zero", *STEP, *STEP],
    "an exception while accumulating": ["waiting", "failing:1,0", *STEP, *STEP],
    "two backwards over one forward": ["twice", "step", "zero", *STEP, "waiting_then_not", "step", "zero", *STEP],
    "loading while gradients wait": ["save", *STEP, "waiting", "load", *STEP],
}


@pytest.mark.parametrize("frees_slots", [False, True])
def test_loops_that_once_went_wrong_equal_one_process(frees_slots: bool) -> None:
    check(list(CASES.values()), reshard_after_forward=frees_slots)


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(LOOPS, min_size=12, max_size=12))
def test_any_sequence_of_events_equals_one_process(loops: list[list[str]]) -> None:
    check(loops)


@pytest.mark.nightly
@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.lists(LOOPS, min_size=12, max_size=12))
def test_any_sequence_equals_one_process_where_slots_are_freed(loops: list[list[str]]) -> None:
    check(loops, reshard_after_forward=True)


def step_on_one_rank_alone() -> None:
    loop = Loop()
    loop.micro()
    if loop.rank == 0:
        loop.optimizer.step()
    loop.micro()


def test_a_step_on_one_rank_alone_is_an_error_on_all() -> None:
    for error in rank_errors(step_on_one_rank_alone, 2):
        assert "ranks have made different numbers of optimizer steps (1, 0, by rank)" in error
