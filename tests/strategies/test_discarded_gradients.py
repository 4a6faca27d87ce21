"""Gradients that a user's own code reads or throws away, under Lightning and Fabric: ranks equal one process."""

from __future__ import annotations

import torch
from lightning.fabric import Fabric
from torch import Tensor

from tests.helpers import run_ranks
from tests.strategies.cases import Model, assert_close, assert_same_fit, loader, whole


class ThrowsAway(Model):
    """Discards the first half of every second accumulation window."""

    def on_train_batch_start(self, batch: object, i: int) -> None:
        if i % 4 == 1:
            self.optimizers().zero_grad()  # type: ignore[union-attr]


class SkipsLargeSteps(Model):
    """Skips a step with large expert gradients, and scales other gradients, both by norms that it reads."""

    def on_after_backward(self) -> None:
        gradients = [p.grad for p in self.moe.experts.parameters() if p.grad is not None]
        norm = sum(gradient.norm().item() ** 2 for gradient in gradients) ** 0.5
        finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
        if norm > 0.022 or not finite:
            self.zero_grad()
        else:
            for gradient in gradients:
                gradient.mul_(norm)


def test_a_micro_batch_that_is_thrown_away_is_gone() -> None:
    assert_same_fit(ThrowsAway, accumulate_grad_batches=2)


def test_a_guard_of_the_users_decides_alike_on_all_ranks() -> None:
    assert_same_fit(SkipsLargeSteps)


def fabric_loop(world_size: int) -> dict[str, Tensor]:
    """Each step is after a micro-batch whose gradients are thrown away."""
    fabric = Fabric(accelerator="cpu", devices=world_size, strategy="swiftmoe" if world_size > 1 else "auto")
    fabric.launch()
    module = Model()
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    batches = [list(batch) for batch in loader(world_size)]
    for spike, batch in zip(batches, batches[1:], strict=False):
        with fabric.no_backward_sync(model, enabled=world_size > 1):
            fabric.backward(100 * (model(spike[0]) - spike[1]).square().mean())
        optimizer.zero_grad()
        fabric.backward((model(batch[0]) - batch[1]).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return whole(module)


def test_what_fabric_accumulates_can_be_thrown_away() -> None:
    (expected,) = run_ranks(fabric_loop, 1, 1, init=False)
    for state in run_ranks(fabric_loop, 2, 2, init=False):
        assert_close(state, expected)
