"""Experts and their optimizer state in the CPU's memory: the same training, and the same checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftmoe_lightning.engine import checkpoint
from tests.engine import dense, models
from tests.engine.test_expert_groups import build, train
from tests.engine.test_matches_dense_reference import relative_error
from tests.helpers import nightly, run_ranks


def train_offloaded(size: int, mode: str) -> dict[str, Tensor]:
    engine, model, optimizer = build(size, torch.float64, offload_optimizer=True, dense=mode)
    train(engine, model, optimizer, range(dense.STEPS), torch.float64)
    for layer in engine.layers:
        for parameter in layer.experts.parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.device_mesh.device_type == "cpu"
            assert parameter.to_local().device.type == "cpu"
            assert optimizer.state[parameter]["exp_avg"].device.type == "cpu"
    return engine.full_state_dict()


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("world_size", "size"), [*nightly((2, 2)), (4, 2)])
def test_an_offloaded_run_equals_a_dense_single_process(world_size: int, size: int, mode: str) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), torch.float64)
    for state in run_ranks(train_offloaded, world_size, size, mode):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-12, errors


def save_or_resume(folder: str, mode: str, resumes: bool) -> dict[str, Tensor]:
    """Half of the steps and a checkpoint; or, on other ranks, which free their slots, too, the rest from it."""
    options = {"offload_optimizer": True, "dense": mode, "reshard_after_forward": resumes}
    engine, model, optimizer = build(dist.get_world_size(), torch.float64, **options)
    half = dense.STEPS // 2
    parts: dict[str, Any] = {"model": engine.module, "optimizer": optimizer}
    if resumes:
        saved = torch.load(Path(folder, "half.pt"), weights_only=True)
        parts["model"].load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        engine.load_state_dict(saved["engine"])
    else:
        train(engine, model, optimizer, range(half), torch.float64)
        state = {"model": engine.module.state_dict(), "optimizer": optimizer.state_dict()}
        whole = checkpoint.full_state(state, keep=dist.get_rank() == 0)
        if dist.get_rank() == 0:
            torch.save({**whole, "engine": engine.state_dict()}, Path(folder, "half.pt"))
        return {}
    train(engine, model, optimizer, range(half, dense.STEPS), torch.float64)
    return engine.full_state_dict()


@pytest.mark.parametrize("mode", [*nightly("ddp"), "fsdp2"])
def test_an_offloaded_run_resumes_on_other_ranks(tmp_path: Path, mode: str) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), torch.float64)
    run_ranks(save_or_resume, 2, str(tmp_path), mode, False)
    for state in run_ranks(save_or_resume, 3, str(tmp_path), mode, True):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-12, errors
