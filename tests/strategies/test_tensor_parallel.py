"""A tensor-parallel dense part under Lightning's Trainer and Fabric: the same training as on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader

import swiftmoe_lightning as sml
from swiftmoe_lightning.strategies.tensor_parallel import mesh_shape
from tests.engine.models import RandomPolicy
from tests.helpers import run_ranks
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
        (4, TP2, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, False),
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


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
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


def test_the_mesh_has_lightnings_axes_and_all_ranks() -> None:
    assert mesh_shape(8, 2) == (4, 2)
    assert mesh_shape(2, 2) == (1, 2)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide the 6 ranks.*1, 2, 3, 6\."):
        mesh_shape(6, 4)
    with pytest.raises(ValueError, match="tensor_parallel_size must be a whole number of 1 or more, got 0"):
        sml.SwiftMoEStrategy(tensor_parallel_size=0)
    with pytest.raises(RuntimeError, match="there is no device mesh: set tensor_parallel_size"):
        _ = sml.SwiftMoEStrategy().device_mesh
