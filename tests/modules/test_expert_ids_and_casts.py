"""Casts that leave a router's bias in float32, and expert ids that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import swiftmoe_lightning as sml
from swiftmoe_lightning.modules import expert_inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_bias_takes_small_steps_whatever_the_module_is_cast_to(dtype: torch.dtype) -> None:
    moe = sml.MoE(8, 4, 2, 1, router=sml.TopKRouter(8, 2, 1, bias_update_rate=1e-4)).to(dtype)
    assert moe.router.weight.dtype == dtype
    for _ in range(700):
        moe.router.update_bias(np.array([3, 1]))
    torch.testing.assert_close(moe.to(dtype).router.expert_bias, torch.tensor([-0.07, 0.07]), rtol=1e-4, atol=0)


def choose(ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = sml.Experts(3, 4, 5)(torch.ones(2, 4), ids, torch.ones(2, 1))
    return out


@pytest.mark.parametrize("ids", [torch.ones(2, 1), torch.ones(2, 1, dtype=torch.bool)])
def test_ids_that_are_no_integers_are_refused(ids: torch.Tensor) -> None:
    with pytest.raises(TypeError, match=r"expert ids as integers of 0\.\.2 .* got torch\.(float32|bool)"):
        choose(ids)


@pytest.mark.parametrize("wrong", [-2, 4])
def test_ids_of_no_expert_are_refused(wrong: int) -> None:
    with pytest.raises(ValueError, match=r"expert ids must be 0\.\.2 .*, got -?\d\.\.-?\d"):
        choose(torch.tensor([[0], [wrong]]))


def test_on_a_gpu_ids_are_looked_at_under_anomaly_detection_alone() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [expert_inputs._may_wait_for(device) for device in (cpu, gpu)] == [True, False]
    with torch.autograd.set_detect_anomaly(True):
        assert [expert_inputs._may_wait_for(device) for device in (cpu, gpu)] == [True, True]


@pytest.mark.parametrize("capacity", [1.0, 2, "rank", True])
def test_a_capacity_of_another_type_is_refused(capacity: Any) -> None:
    with pytest.raises(ValueError, match=rf"capacity must be a Capacity, or None, got {capacity!r}\. Write"):
        sml.Experts(2, 4, 4, capacity=capacity)


def test_assignments_to_other_ranks_experts_add_nothing() -> None:
    assert choose(torch.tensor([[-1], [3]])).count_nonzero() == 0
