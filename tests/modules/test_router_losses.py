"""Router losses reach the loss of the model however its blocks are run: once, twice, checkpointed, on ranks."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from tests.engine.models import my_part
from tests.helpers import run_ranks

DIM = 6


class Model(nn.Module):
    """Two blocks, the first of which runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(DIM, DIM)
        self.blocks = nn.ModuleList(sml.MoE(DIM, 5, 4, 2, aux_loss_coef=0.5, z_loss_coef=0.1) for _ in range(2))
        self.double()

    def forward(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        x = self.inner(x)
        for block in (self.blocks[0], self.blocks[0], self.blocks[1]):
            x = x + run(block, x)
        return x


RUNS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda block, x: block(x),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not reentrant": functools.partial(checkpoint, use_reentrant=False),
}


def train(kind: str, scale: float = 1.0) -> dict[str, Tensor]:
    """Losses of three micro-batches and the gradients that are left, as DDP would average them."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = Model()
    engine = sml.SwiftMoEEngine(model)
    losses = []
    for step in range(3):
        x = torch.randn(12, DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        out = model(my_part(x, rank, world_size), RUNS[kind])
        auxiliary = sml.auxiliary_loss(model)
        (scale * (out.square().mean() + auxiliary + auxiliary)).backward()
        losses.append(auxiliary.detach())
    actual = {"losses": torch.stack(losses)}
    if world_size > 1:
        dist.all_reduce(actual["losses"])
        actual["losses"] /= world_size
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        elif world_size > 1:
            dist.all_reduce(gradient)
            gradient /= world_size
        actual[name] = gradient / scale
    del engine
    return actual


def by_hand() -> dict[str, Tensor]:
    """The same, with the losses of every block called for right after it."""
    model, losses = Model(), []
    for step in range(3):
        x = torch.randn(12, DIM, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        parts: list[Tensor] = []

        def run(block: nn.Module, x: Tensor, parts: list[Tensor] = parts) -> Tensor:
            out: Tensor = block(x)
            parts.append(sml.auxiliary_loss(block))
            return out

        out = model(x, run)
        auxiliary = torch.stack(parts).sum()
        (out.square().mean() + 2 * auxiliary).backward()
        losses.append(auxiliary.detach())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": torch.stack(losses), **gradients}


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_and_gradients_do_not_depend_on_how_blocks_run(kind: str, world_size: int) -> None:
    expected = by_hand()
    assert float(expected["losses"].min()) > 1
    for actual in run_ranks(train, world_size, kind, 8.0):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", RUNS)
def test_losses_that_nobody_asks_for_train_nothing(kind: str) -> None:
    model = Model()
    model(torch.ones(3, DIM, dtype=torch.float64), RUNS[kind]).sum().backward()
    expected = copy.deepcopy(model)
    for block in expected.blocks:
        block.aux_loss_coef = block.z_loss_coef = 0.0
    expected.zero_grad()
    expected(torch.ones(3, DIM, dtype=torch.float64), RUNS["plain"]).sum().backward()
    for parameter, reference in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-9, atol=1e-12)


def test_a_loss_by_itself_has_gradients_and_evaluation_has_none() -> None:
    model = Model()
    x = torch.randn(3, DIM, dtype=torch.float64)
    model(x, RUNS["plain"])
    sml.auxiliary_loss(model).backward()
    assert all(block.router.weight.grad.count_nonzero() for block in model.blocks)
    with torch.no_grad():
        model.eval()(x, RUNS["plain"])
    assert float(sml.auxiliary_loss(model)) == 0
