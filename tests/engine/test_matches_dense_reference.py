"""W ranks with any placements train like one process with a plain dense MoE on the same global batch."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import nightly, run_ranks


def train_ranks(dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """The run of `dense.train_dense`, spread; also the number of different placements the first layer went through."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = models.build(dtype)
    if rank:
        # Only rank 0's values may count.
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(rank)
    slots = None if world_size == 1 else 4
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(slots_per_rank=slots, placement=models.RandomPolicy))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))
    seen = set()
    for step in range(dense.STEPS):
        seen.add(engine.placements["1.experts"])
        for micro_batch in range(dense.MICRO_BATCHES):
            last = micro_batch == dense.MICRO_BATCHES - 1
            x, target = (models.my_part(t, rank, world_size) for t in dense.batch(step, micro_batch, dtype))
            with nullcontext() if last or world_size == 1 else model.no_sync():
                (F.mse_loss(model(x), target) / dense.MICRO_BATCHES).backward()
        engine.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict(), len(seen)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [*nightly((torch.float32, 1e-5)), (torch.float64, 1e-12)])
def test_thirty_steps_with_a_new_placement_each_equal_a_dense_single_process(
    world_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), dtype)
    for state, num_placements in run_ranks(train_ranks, world_size, dtype):
        assert num_placements == (1 if world_size == 1 else dense.STEPS)
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= tolerance, errors


def one_step_gradients(tables: list[list[int]]) -> list[dict[str, Tensor]]:
    """Full gradients of one step under each of these placements of the first layer."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    actual = []
    for table in tables:
        module = models.build()
        engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(slots_per_rank=len(table) // world_size))
        placement = sml.Placement(np.array(table), dense.NUM_EXPERTS, world_size)
        engine.layers[0].slots.placement = placement
        model = engine.data_parallel()
        x, target = (models.my_part(t, rank, world_size) for t in dense.batch(0, 0, torch.float32))
        F.mse_loss(model(x), target).backward()
        assert engine.layers[0].placement == placement
        gradients = {name: p.grad for name, p in module.named_parameters()}
        actual.append({n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in gradients.items()})
    return actual


def tables_for(world_size: int, slots_per_rank: int) -> st.SearchStrategy[list[int]]:
    spare = world_size * slots_per_rank - dense.NUM_EXPERTS
    extra = st.lists(st.integers(0, dense.NUM_EXPERTS - 1), min_size=spare, max_size=spare)
    return extra.flatmap(lambda more: st.permutations([*range(dense.NUM_EXPERTS), *more]))


@settings(max_examples=4, deadline=None, derandomize=True)
@given(st.integers(2, 4).flatmap(lambda w: st.tuples(st.just(w), st.lists(tables_for(w, 4), min_size=8, max_size=8))))
def test_gradients_do_not_depend_on_the_placement(case: tuple[int, list[list[int]]]) -> None:
    world_size, tables = case
    weights = {name: value.clone().requires_grad_() for name, value in models.build().state_dict().items()}
    x, target = dense.batch(0, 0, torch.float32)
    F.mse_loss(dense.dense_forward(weights, x), target).backward()
    for gradients in run_ranks(one_step_gradients, world_size, tables)[0]:
        for name, weight in weights.items():
            assert weight.grad is not None
            assert relative_error(gradients[name], weight.grad) <= 1e-6, (name, tables)


def evaluate_unevenly(num_batches: list[int]) -> list[Tensor]:
    """Forward of each rank's own batches; ranks have differently many, of different sizes."""
    rank = dist.get_rank()
    module = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(module)
    with torch.no_grad():
        outputs = [module(dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]) for i in range(num_batches[rank])]
    engine.join()
    return outputs


def test_ranks_with_fewer_or_no_evaluation_batches_serve_the_others() -> None:
    num_batches = [2, 0, 3]
    weights = models.build(torch.float64).state_dict()
    for rank, outputs in enumerate(run_ranks(evaluate_unevenly, 3, num_batches)):
        assert len(outputs) == num_batches[rank]
        for i, output in enumerate(outputs):
            x = dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]
            torch.testing.assert_close(output, dense.dense_forward(weights, x), rtol=1e-12, atol=1e-14)


def train_with_an_empty_rank() -> dict[str, Tensor]:
    """One SGD step in which rank 1 has no tokens at all."""
    rank = dist.get_rank()
    module = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(module)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    x, target = dense.batch(0, 0, torch.float64)
    x, target = (x, target) if rank == 0 else (x[:0], target[:0])
    (model(x) - target).square().sum().backward()
    optimizer.step()
    return engine.full_state_dict()


def test_a_rank_without_tokens_takes_part() -> None:
    weights = {name: v.clone().requires_grad_() for name, v in models.build(torch.float64).state_dict().items()}
    x, target = dense.batch(0, 0, torch.float64)
    ((dense.dense_forward(weights, x) - target).square().sum() / 2).backward()
    for state in run_ranks(train_with_an_empty_rank, 2):
        for name, weight in weights.items():
            assert weight.grad is not None
            torch.testing.assert_close(state[name], (weight - 0.1 * weight.grad).detach(), rtol=1e-10, atol=1e-13)
