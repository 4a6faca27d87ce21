"""A backward that raises, is caught, and is tried again: under DDP, and under frameworks that wrap the module anew."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.engine.test_random_training_loops import Explode
from tests.helpers import rank_errors, run_ranks


def train(fails: bool, wraps_again: bool = True) -> dict[str, Tensor]:
    """Two SGD steps; each may have a first try that fails once the last layer has its gradients."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    module = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(module)
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    for step in range(2):
        x, target = (models.my_part(t, rank, world_size) for t in dense.batch(step, 0, torch.float64))
        if fails:
            handle = module[2].register_forward_hook(lambda _, __, out: Explode.apply(out))
            with pytest.raises(ZeroDivisionError):
                F.mse_loss(wrapped(x), target).backward()
            handle.remove()
            optimizer.zero_grad()
            if wraps_again:
                wrapped = engine.data_parallel()
        F.mse_loss(wrapped(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


def test_a_failed_backward_leaves_no_trace() -> None:
    expected = train(False)
    for actual in run_ranks(train, 2, True):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)


def test_without_a_new_wrapper_ddp_cannot_go_on_and_says_so() -> None:
    for error in rank_errors(train, 2, True, False):
        assert "wrap the module again (model = engine.data_parallel())" in error
