"""What stock code, hooks and norms see of gradients that are cut over the ranks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import rank_errors, run_ranks


def backward(module: nn.Module, forward: nn.Module | None = None) -> None:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, target = (models.my_part(t, rank, world_size) for t in dense.batch(0, 0, torch.float64))
    F.mse_loss((forward or module)(x), target).backward()


def read_numbers() -> list[float]:
    """What users' checks and logs read of the experts' gradients, as plain numbers."""
    module = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(module)
    backward(module, engine.data_parallel())
    gradient = module[1].experts.gate_up_proj.grad
    assert gradient is not None
    read = [gradient.norm(), gradient.norm(1), gradient.abs().max(), gradient.sum(), gradient.mean()]
    numbers = [value.item() for value in read]
    numbers += [float(bool(gradient.isnan().any())), float(bool(gradient.isfinite().all()))]
    if engine.group is None or engine.group.is_first:
        local = gradient.to_local() if engine.group else gradient
        local[0, 0] = math.nan
    return [*numbers, float(bool(gradient.isnan().any())), float(bool(gradient.isfinite().all()))]


def test_numbers_read_from_gradients_are_of_the_whole_tensor_on_every_rank() -> None:
    expected = read_numbers()
    assert expected[-4:] == [0, 1, 1, 0]
    for actual in run_ranks(read_numbers, 2):
        assert actual == pytest.approx(expected, rel=1e-9)


def train_with_hooks(before: bool) -> dict[str, Tensor]:
    """One SGD step of which hooks halve a gradient, and step and clear another by itself.

    before: the hooks are registered before the engine takes the parameters over.
    """
    module = models.build(torch.float64)
    seen = []

    def register() -> None:
        module[1].experts.gate_up_proj.register_hook(lambda gradient: gradient * 0.5)
        module[2].experts.down_proj.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.norm().item()))

    if before:
        register()
    engine = sml.SwiftMoEEngine(module)
    wrapped = engine.data_parallel()
    if not before:
        register()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    backward(module, wrapped)
    optimizer.step()
    return {**engine.full_state_dict(), "seen": torch.tensor(seen)}


@pytest.mark.parametrize("before", [True, False])
def test_hooks_on_experts_see_the_collected_gradient(before: bool) -> None:
    expected = train_with_hooks(before)
    assert len(expected["seen"]) == 1
    for actual in run_ranks(train_with_hooks, 2, before):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)


def run_back_after_a_step() -> None:
    module = models.build()
    engine = sml.SwiftMoEEngine(module)
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module[2].experts.parameters(), lr=0.1))
    x, target = dense.batch(0, 0, torch.float32)
    loss = F.mse_loss(module(x), target)
    loss.backward(retain_graph=True)
    optimizer.step()
    loss.backward()


def test_backward_through_replaced_weights_is_an_error() -> None:
    for error in rank_errors(run_back_after_a_step, 2):
        assert "backward through a forward from before the last optimizer step" in error


class Flat(nn.Module):
    """An MoE of so few rows that some of 4 ranks own none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = sml.MoE(9, 3, 4, 2, bias=True, dtype=dtype)


def norms(dtype: torch.dtype, scale: float, norm_types: list[float]) -> list[float]:
    """Norms of gradients of `scale`, as the engine says and, last, what clipping leaves."""
    module = Flat(dtype)
    engine = sml.SwiftMoEEngine(module)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, scale)
    actual = [float(engine.grad_norm(norm_type)) for norm_type in norm_types]
    engine.clip_grad_value_(0.9 * scale)
    engine.clip_grad_norm_(1.0)
    return [*actual, float(engine.grad_norm())]


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3)])
def test_norms_of_any_order_and_dtype_where_ranks_own_nothing(
    world_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    num_elements = sum(p.numel() for p in Flat(dtype).parameters())
    # In float16 the sum of squares would be inf.
    scale, orders = 64.0, [1.0, 2.0, 3.0, math.inf]
    expected = [scale * num_elements ** (1 / order) for order in orders]
    clamped = 0.9 * expected[1]
    for actual in run_ranks(norms, world_size, dtype, scale, orders):
        assert actual == pytest.approx([*expected, clamped / (clamped + 1e-6)], rel=tolerance)
