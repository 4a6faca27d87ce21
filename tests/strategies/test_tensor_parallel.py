"""A tensor-parallel dense part under Lightning's Trainer and Fabric: the same training as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

import swiftmoe_lightning as sml
from swiftmoe_lightning.strategies.tensor_parallel import mesh_shape
from tests.engine import dense, models
from tests.engine import test_tensor_parallel as test_engine
from tests.engine.models import RandomPolicy
from tests.helpers import nightly, run_ranks
from tests.strategies import cases
from tests.strategies.test_fully_sharded import Blocks

HIDDEN = 12


class WithMLP(Blocks):
    """An MLP before the blocks, parallelized as Lightning's documentation does."""

    def __init__(self, cuts_itself: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(cases.DIM, HIDDEN), nn.Linear(HIDDEN, cases.DIM)
        self.cuts_itself = cuts_itself

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.down(self.up(x).relu()))

    def train_dataloader(self) -> DataLoader[Any]:
        return self.batches(cases.GLOBAL_BATCH * cases.NUM_BATCHES, cases.GLOBAL_BATCH)

    def val_dataloader(self) -> DataLoader[Any]:
        # Two data-parallel ranks have differently many batches of it.
        return self.batches(9, 2)

    def batches(self, size: int, global_batch: int) -> DataLoader[Any]:
        """This rank's part of global batches, by the Trainer's own account of who has which samples."""
        part = self.trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        indices = range(part["rank"], size, part["num_replicas"])
        return DataLoader(cases.Noise(size), batch_size=global_batch // part["num_replicas"], sampler=indices)

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is None or isinstance(self.up.weight, DTensor):
            return
        parallelize_module(self, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if self.cuts_itself:
            experts = {p for m in self.modules() if isinstance(m, sml.Experts) for p in m.parameters()}
            for part in [*self.blocks, self]:
                fully_shard(part, mesh=mesh["data_parallel"], ignored_params=experts)


def fit(
    world_size: int,
    strategy: dict[str, Any] | None,
    options: dict[str, Any],
    cuts_itself: bool = False,
    path: str | None = None,
) -> dict[str, Tensor]:
    """The end state of a fit, from `path` if it is there, else saved there. Without a strategy, that of one process."""
    model = WithMLP(cuts_itself)
    ours = "auto" if strategy is None else sml.SwiftMoEStrategy(**{"placement": RandomPolicy, **strategy})
    runner = cases.trainer(world_size, ours, **options)
    start = path if path and Path(path).exists() else None
    runner.fit(model, ckpt_path=start)
    if path and start is None:
        runner.save_checkpoint(path)
    state = cases.whole(model)
    if isinstance(ours, sml.SwiftMoEStrategy):
        assert len(ours.engine.layers) == 2
        assert isinstance(model.up.weight, DTensor)
        assert model.up.weight.to_local().numel() == HIDDEN * cases.DIM // world_size
    return state


TP2, TP1 = ({"tensor_parallel_size": size, "dense": "fsdp2"} for size in (2, 1))


@pytest.mark.parametrize(
    ("world_size", "strategy", "options", "cuts_itself"),
    [
        *nightly((4, TP2, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, False)),
        (4, {**TP2, "expert_parallel_size": 2}, {"gradient_clip_val": 0.1}, True),
        (2, {"tensor_parallel_size": 2}, {"gradient_clip_val": 0.1}, False),
    ],
    ids=["accumulated", "cut by the user, groups", "no data-parallel ranks"],
)
def test_a_fit_equals_one_process(
    world_size: int, strategy: dict[str, Any], options: dict[str, Any], cuts_itself: bool
) -> None:
    (expected,) = run_ranks(fit, 1, 1, None, options, init=False)
    for state in run_ranks(fit, world_size, world_size, strategy, options, cuts_itself, init=False):
        cases.assert_close(state, expected, 1e-5)


@pytest.mark.parametrize("directory", [*nightly(False), True], ids=["file", "directory"])
def test_a_run_goes_on_at_another_tensor_parallel_size(directory: bool, tmp_path: Path) -> None:
    path, again = str(tmp_path / "two.ckpt"), str(tmp_path / "one.ckpt")
    (expected,) = run_ranks(fit, 1, 1, None, {"max_epochs": 3}, init=False)
    kind = {"save_distributed_checkpoint": directory}
    run_ranks(fit, 4, 4, {**TP2, **kind}, {"max_epochs": 1}, False, path, init=False)
    for state in run_ranks(fit, 2, 2, {**TP1, **kind}, {"max_epochs": 3}, False, path, init=False):
        cases.assert_close(state, expected)
    run_ranks(fit, 2, 2, {**TP1, **kind}, {"max_epochs": 1}, False, again, init=False)
    for state in run_ranks(fit, 4, 4, {**TP2, **kind}, {"max_epochs": 3}, True, again, init=False):
        cases.assert_close(state, expected)


def parallelize(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(module, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


def run_fabric(world_size: int, size: int | None, path: str) -> dict[str, Tensor]:
    """Three clipped steps of two micro-batches each, on from `path` if it is there, else saved there."""
    options = {"placement": RandomPolicy, "tensor_parallel_size": size, "parallelize_fn": parallelize}
    ours = sml.SwiftMoEFabricStrategy(dense="fsdp2", **options) if size else "auto"
    fabric = Fabric(accelerator="cpu", strategy=ours, devices=world_size)
    fabric.launch()
    built = test_engine.WithMLP(torch.float64)
    model, optimizer = fabric.setup(built, torch.optim.AdamW(built.parameters(), lr=1e-2))
    progress = {"model": model, "optimizer": optimizer, "step": 0}
    if is_resumed := Path(path).exists():
        fabric.load(path, progress)
    part = fabric.strategy.distributed_sampler_kwargs if size else {"rank": 0, "num_replicas": 1}
    for step in range(progress["step"], progress["step"] + 3):
        for micro_batch in range(2):
            batch = dense.batch(step, micro_batch, torch.float64)
            x, target = (models.my_part(t, part["rank"], part["num_replicas"]) for t in batch)
            with fabric.no_backward_sync(model, enabled=bool(size) and micro_batch == 0):
                fabric.backward(F.mse_loss(model(x), target))
        fabric.clip_gradients(model, optimizer, max_norm=0.2)
        optimizer.step()
        optimizer.zero_grad()
    if not is_resumed:
        fabric.save(path, {**progress, "step": 3})
    return cases.whole(built)


def test_a_fabric_loop_goes_on_at_another_tensor_parallel_size(tmp_path: Path) -> None:
    alone, path = str(tmp_path / "alone.ckpt"), str(tmp_path / "two.ckpt")
    for _ in range(2):
        (expected,) = run_ranks(run_fabric, 1, 1, None, alone, init=False)
    run_ranks(run_fabric, 4, 4, 2, path, init=False)
    for state in run_ranks(run_fabric, 2, 2, 1, path, init=False):
        cases.assert_close(state, expected, 1e-9)


def test_the_mesh_has_lightnings_axes_and_all_ranks() -> None:
    assert mesh_shape(8, 2) == (4, 2)
    assert mesh_shape(2, 2) == (1, 2)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide the 6 ranks.*1, 2, 3, 6\."):
        mesh_shape(6, 4)
    with pytest.raises(ValueError, match="tensor_parallel_size must be a whole number of 1 or more, got 0"):
        sml.SwiftMoEStrategy(tensor_parallel_size=0)
    with pytest.raises(ValueError, match="parallelize_fn needs a mesh. Set tensor_parallel_size"):
        sml.SwiftMoEFabricStrategy(parallelize_fn=parallelize)
    with pytest.raises(RuntimeError, match="there is no device mesh: set tensor_parallel_size"):
        _ = sml.SwiftMoEStrategy().device_mesh
