"""The update on local shards: which optimizers work, how they clip, what they save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swiftmoe_lightning as sml
from tests.engine import models
from tests.helpers import rank_errors, run_ranks


class Impatient(torch.optim.Optimizer):
    """An elementwise optimizer whose state is allocated when it is made, as in torch 2.11's Adagrad."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, 0.1)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                state = self.state[parameter]
                state["step"] += 1
                state["sum"].addcmul_(parameter.grad, parameter.grad)
                parameter.addcdiv_(parameter.grad, state["sum"].sqrt(), value=-self.param_groups[0]["lr"])
        return loss


SOME = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (torch.optim.AdamW, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    (torch.optim.AdamW, {"lr": 1e-2, "foreach": True, "amsgrad": True, "maximize": True}),
    (torch.optim.Adam, {"lr": torch.tensor(1e-2), "fused": True}),
    (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.9, "centered": True}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
    (Impatient, {"lr": 1e-2}),
    (torch.optim.Adamax, {"lr": 1e-2}),
    (torch.optim.NAdam, {"lr": 1e-2}),
    (torch.optim.RAdam, {"lr": 1e-2}),
    (torch.optim.Rprop, {"lr": 1e-3}),
    (torch.optim.ASGD, {"lr": 1e-2}),
]


def train(kind: Any, options: dict[str, Any], stock_clip: bool, with_closure: bool) -> tuple[dict[str, Tensor], Any]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(placement=models.RandomPolicy))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(kind(module.parameters(), **options))
    for step in range(4):
        x, target = (models.my_part(t, rank, world_size) for t in models.dense.batch(step, 0, torch.float64))

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()  # noqa: B023 - called in this turn of the loop
            loss.backward()
            if stock_clip:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
                torch.nn.utils.clip_grad_value_(module.parameters(), 0.1)
            else:
                engine.clip_grad_norm_(0.5)
                engine.clip_grad_value_(0.1)
            return loss

        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    state = optimizer.state_dict()["state"]
    shapes = {i: {k: tuple(v.shape) for k, v in s.items() if isinstance(v, Tensor)} for i, s in state.items()}
    return engine.full_state_dict(), shapes


def train_with_each(with_closure: bool) -> list[tuple[dict[str, Tensor], dict[int, Any]]]:
    return [train(kind, options, False, with_closure) for kind, options in SOME]


def test_elementwise_optimizers_update_ranks_like_one_process() -> None:
    (alone,) = run_ranks(train_with_each, 1, False)
    for rank in run_ranks(train_with_each, 3, True):
        for chosen, (state, shapes), (expected, expected_shapes) in zip(SOME, rank, alone, strict=True):
            assert shapes == expected_shapes, chosen
            for name, value in expected.items():
                torch.testing.assert_close(
                    state[name], value, rtol=1e-8, atol=1e-10, msg=lambda text, chosen=chosen: f"{chosen}: {text}"
                )


def test_stock_clipping_of_all_parameters_at_once_is_right() -> None:
    ((expected, _),) = run_ranks(train, 1, *SOME[1], True, False)
    for state, _ in run_ranks(train, 2, *SOME[1], True, False):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-10)


class NoFused(torch.optim.SGD):
    """An optimizer whose fused kernel is not there for this device."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if self.param_groups[0]["fused"]:
            raise RuntimeError("no fused kernel for device cpu")
        return super().step(closure)


def prepare(kind: Any, options: dict[str, Any]) -> None:
    module = models.build()
    engine = sml.SwiftMoEEngine(module)
    engine.prepare_optimizer(kind(module.parameters(), **options))


def test_a_fused_request_that_cannot_be_met_is_refused_with_the_fix() -> None:
    for error in rank_errors(prepare, 2, NoFused, {"lr": 0.1, "fused": True}):
        assert "NoFused cannot update shards as it is set up" in error
        assert "no fused kernel for device cpu" in error
        assert "If it is the fused or foreach flag that fails on this device or dtype, leave it unset" in error


def norms(norm_type: float) -> tuple[float, list[Tensor]]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(module)
    x, target = (models.my_part(t, rank, world_size) for t in models.dense.batch(0, 0, torch.float64))
    model = engine.data_parallel()
    (model(x) - target).square().mean().backward()
    total = engine.clip_grad_norm_(0.01, norm_type)
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return float(total), [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping_counts_every_element_once(norm_type: float) -> None:
    ((expected, expected_gradients),) = run_ranks(norms, 1, norm_type)
    for actual, gradients in run_ranks(norms, 3, norm_type):
        assert actual == pytest.approx(expected, rel=1e-10)
        for a, b in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
