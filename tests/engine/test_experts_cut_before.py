"""Experts that were DTensors before the engine: taken over where that is right, refused where not."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import rank_errors, run_ranks

CUTS = {
    "by expert": ((4,), [Shard(0)]),
    "by rows of other ranks": ((4,), [Shard(2)]),
    "by expert, with copies": ((2, 2), [Replicate(), Shard(0)]),
    "by expert and row": ((2, 2), [Shard(0), Shard(1)]),
}


def take_over(case: str, size: int) -> dict[str, Tensor]:
    """One SGD step of a model whose first layer's experts a plan for expert parallelism has cut."""
    module = models.build(torch.float64)
    shape, placements = CUTS[case]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
    for name in ("gate_up_proj", "down_proj"):
        whole = getattr(module[1].experts, name)
        setattr(module[1].experts, name, nn.Parameter(distribute_tensor(whole.detach(), mesh, placements)))
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(expert_parallel_size=size))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    x, target = (models.my_part(t, dist.get_rank(), 4) for t in dense.batch(0, 0, torch.float64))
    (model(x) - target).square().mean().backward()
    optimizer.step()
    return engine.full_state_dict()


@pytest.mark.parametrize("case", CUTS)
def test_experts_of_another_cut_train_like_one_process(case: str) -> None:
    weights = {name: v.clone().requires_grad_() for name, v in models.build(torch.float64).state_dict().items()}
    x, target = dense.batch(0, 0, torch.float64)
    (dense.dense_forward(weights, x) - target).square().mean().backward()
    for state in run_ranks(take_over, 4, case, 2 if "copies" in case else 4):
        for name, weight in weights.items():
            assert weight.grad is not None
            torch.testing.assert_close(state[name], (weight - 0.1 * weight.grad).detach(), rtol=1e-10, atol=1e-13)


def fully_shard_before(ignores: bool) -> None:
    module = models.build()
    dist.barrier()
    experts = {p for part in module.modules() if isinstance(part, sml.Experts) for p in part.parameters()}
    for layer in (*module, module):
        fully_shard(layer, ignored_params=experts if ignores else set())
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(dense="fsdp2"))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    model(dense.batch(dist.get_rank(), 0, torch.float32)[0]).sum().backward()
    optimizer.step()
    assert all(isinstance(p, DTensor) for p in module.parameters())


def test_fully_sharded_experts_are_refused_with_the_fix() -> None:
    for error in rank_errors(fully_shard_before, 2, False):
        assert "fully_shard has cut the experts in '2'" in error
        assert "Make the engine first, with dense='fsdp2'" in error


def test_experts_that_fully_shard_was_told_to_ignore_are_spread() -> None:
    run_ranks(fully_shard_before, 2, True)
