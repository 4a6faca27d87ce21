"""Optimizer state that is cut over replicas: gradients are the mean over all ranks, and replicas get all weights."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.step.static_groups import CutState
from swiftmoe_lightning.distributed import RankGroup
from tests.helpers import run_ranks


def _cut() -> tuple[list[float], list[float]]:
    group = RankGroup(dist.group.WORLD)
    parameter = nn.Parameter(torch.arange(4.0).view(2, 2))
    parameter.grad = torch.full((2, 2), 2.0 + 4 * group.rank)
    state = CutState([parameter], group)
    state.sum_gradients()
    gradient = state.shards[0].grad.tolist()
    assert parameter.grad is None
    with torch.no_grad():
        state.shards[0] -= 10 * (group.rank + 1)
    state.gather_weights()
    return gradient, parameter.flatten().tolist()


def test_each_replica_updates_its_part() -> None:
    for gradient, weights in run_ranks(_cut, 2):
        assert gradient == [4.0, 4.0]
        assert weights == [-10.0, -9.0, -18.0, -17.0]


def _uneven() -> None:
    with pytest.raises(AssertionError, match=r"2 replicas must divide the elements of \[\(3,\)\]"):
        CutState([nn.Parameter(torch.zeros(3))], RankGroup(dist.group.WORLD))


def test_replicas_must_divide_the_parameters() -> None:
    run_ranks(_uneven, 2)
