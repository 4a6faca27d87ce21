"""What activation checkpointing repeats chooses as it first did, replays and live forwards of the same input alike."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from tests.modules.test_routing_replay import T, make, random_ids, tokens


def plainly(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def by_reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=True)  # type: ignore[no-any-return]


def by_hooks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)  # type: ignore[no-any-return]


CHECKPOINTS = [
    by_hooks,
    by_reentrant,
    *(
        partial(lambda outer, inner, function, x: outer(partial(inner, function), x), outer, inner)
        for outer in (by_hooks, by_reentrant)
        for inner in (by_hooks, by_reentrant)
    ),
]


class Around(nn.Module):
    """Forwards of the same input: live ones and replays of two recordings, in an order that is given."""

    def __init__(self, run: Callable[..., Tensor], is_frozen: bool) -> None:
        super().__init__()
        self.run, self.moe = run, make()
        self.moe.router.requires_grad_(not is_frozen)

    def loss(self, which: int) -> Tensor:
        """Of the recording `which`; 0 is live. Nothing before the block needs a gradient."""
        context = sml.replay_routing(self.moe, {"experts": random_ids(which)}) if which else nullcontext()
        x = tokens(0).requires_grad_()
        with context:
            return (1 + which) * self.run(lambda x: self.moe(x.detach() if self.is_frozen else x), x).square().sum()

    @property
    def is_frozen(self) -> bool:
        return not self.moe.router.weight.requires_grad

    def gradients(self, order: tuple[int, ...], retain_graph: bool) -> list[dict[str, Tensor]]:
        """Of each forward by itself, forwards in this order, and backwards in the order of their numbers."""
        losses = [(which, self.loss(which)) for which in order]
        gradients = []
        for which, loss in sorted(losses, key=lambda pair: pair[0]):
            for is_last in (False, True) if retain_graph else (True,):
                self.zero_grad()
                loss.backward(retain_graph=not is_last)
            gradients.append({f"{which} {name}": p.grad for name, p in self.named_parameters() if p.grad is not None})
            # A live forward between backwards; it forgets nothing that is needed.
            with torch.no_grad():
                self.moe(tokens(3))
        return gradients


@pytest.mark.parametrize("run", CHECKPOINTS)
@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0, 1), (1, 2)])
def test_forwards_of_one_input_repeat_with_the_choices_of_their_own_context(
    run: Callable[..., Tensor], is_frozen: bool, order: tuple[int, ...]
) -> None:
    for retain_graph in (False, True):
        model = Around(run, is_frozen)
        expected = Around(plainly, is_frozen).gradients(order, retain_graph)
        for actual, one in zip(model.gradients(order, retain_graph), expected, strict=True):
            assert len(one) == 3 - is_frozen
            assert actual.keys() == one.keys()
            for name in one:
                torch.testing.assert_close(actual[name], one[name], rtol=1e-12, atol=1e-12, msg=name)


def test_a_layer_is_as_before_once_no_replay_can_be_repeated() -> None:
    models = [Around(run, is_frozen=False) for run in CHECKPOINTS]
    losses = [model.loss(1) for model in models]
    for model in models:
        model.moe(tokens(3))
        assert model.moe.experts.routing_tap is not None
    torch.stack(losses).sum().backward()
    losses.clear()
    # torch's nested checkpoints are cycles.
    gc.collect()
    for model in models:
        model.moe(tokens(3))
        assert model.moe.experts.routing_tap is None
        assert "forward" not in vars(model.moe.router)


@pytest.mark.parametrize("run", [by_hooks, by_reentrant])
def test_a_context_inside_of_a_checkpoint_is_refused(run: Callable[..., Tensor]) -> None:
    moe = make()

    def region(x: Tensor) -> Tensor:
        with sml.replay_routing(moe, {"experts": random_ids(1)}):
            out: Tensor = moe(x)
        return out

    with pytest.raises(RuntimeError, match=r"opened inside of an activation checkpoint around 'experts'.*around the"):
        run(region, tokens(0).requires_grad_()).sum().backward()


@pytest.mark.parametrize("run", [by_hooks, by_reentrant])
def test_a_repeated_forward_that_cannot_be_told_from_others_is_an_error(run: Callable[..., Tensor]) -> None:
    moe, x = make(), tokens(0).requires_grad_()
    with sml.replay_routing(moe, {"experts": random_ids(0, 2 * T)}):
        loss = run(moe, x).sum() + run(moe, x).sum()
    with pytest.raises(RuntimeError, match="repeats a forward of 'experts' that had the same input as another one"):
        loss.backward()
    noise = iter((0.0, 0.5))
    with sml.replay_routing(moe, {"experts": random_ids(0)}):
        loss = run(lambda x: moe(x + next(noise)), x).sum()
    with pytest.raises(RuntimeError, match="with another input than it had, so what it replayed is not known"):
        loss.backward()
