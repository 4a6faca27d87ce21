"""dense="fsdp2": with the dense part cut over the ranks, too, they train like one process."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.checkpoint import full_state
from tests.engine import dense, models
from tests.helpers import nightly, rank_errors, run_ranks

CONFIG = sml.SwiftMoEConfig(dense="fsdp2", placement=models.RandomPolicy)


class Blocks(nn.Module):
    """The layers of `models.build`, in a ModuleList, so that FSDP2 gathers each by itself."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(layers)

    def forward(self, x_TD: Tensor) -> Tensor:
        for block in self.blocks:
            x_TD = block(x_TD)
        return x_TD


def build(in_blocks: bool) -> nn.Module:
    """A module with other values on each rank, of which only rank 0's count."""
    layers = models.build(torch.float64)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.add_(dist.get_rank())
    return Blocks(layers) if in_blocks else layers


def loss_of(model: nn.Module, step: int, micro_batch: int) -> Tensor:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x, target = (models.my_part(t, rank, world_size) for t in dense.batch(step, micro_batch, torch.float64))
    return F.mse_loss(model(x), target) / dense.MICRO_BATCHES


def train(in_blocks: bool, stock_clip: bool, fused: bool) -> tuple[dict[str, Tensor], int]:
    """The run of `dense.train_dense` with evaluations between, of which each rank has another number."""
    module = build(in_blocks)
    engine = sml.SwiftMoEEngine(module, CONFIG)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2, fused=fused))
    for step in range(dense.STEPS):
        for micro_batch in range(dense.MICRO_BATCHES):
            with nullcontext() if micro_batch == dense.MICRO_BATCHES - 1 else model.no_sync():
                loss_of(model, step, micro_batch).backward()
        if stock_clip:
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        else:
            engine.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 5:
            module.eval()
            with torch.inference_mode():
                for _ in range(dist.get_rank()):
                    model(dense.batch(step, 0, torch.float64)[0])
                engine.join()
            module.train()
    num_elements = sum(p.to_local().numel() for p in module.parameters() if isinstance(p, DTensor))
    state = {name.removeprefix("blocks."): value for name, value in engine.full_state_dict().items()}
    return state, num_elements


@pytest.mark.parametrize(("world_size", "in_blocks"), [(2, True), (2, False), *nightly((3, True)), (4, True)])
@pytest.mark.parametrize(("stock_clip", "fused"), [*nightly((False, False)), (True, True)])
def test_thirty_steps_equal_a_dense_single_process(
    world_size: int, in_blocks: bool, stock_clip: bool, fused: bool
) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), torch.float64)
    outcomes = run_ranks(train, world_size, in_blocks, stock_clip, fused)
    for state, _ in outcomes:
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-12, msg=name)
    # Each element of the model is on one rank alone.
    assert sum(num_elements for _, num_elements in outcomes) == sum(value.numel() for value in expected.values())


def leave_training_first(evaluates: bool) -> None:
    """Rank 0 has one training batch less, and goes on to its evaluation, or to the end of it."""
    module = build(in_blocks=True)
    engine = sml.SwiftMoEEngine(module, CONFIG)
    model = engine.data_parallel()
    for step in range(1 + dist.get_rank()):
        loss_of(model, step, 0).backward()
    if dist.get_rank() == 0:
        module.eval()
        with torch.no_grad():
            if evaluates:
                model(dense.batch(0, 0, torch.float64)[0])
            engine.join()


@pytest.mark.parametrize("evaluates", [True, False])
def test_uneven_training_batches_are_an_error_on_all_that_says_who_does_what(evaluates: bool) -> None:
    for error in rank_errors(leave_training_first, 3, evaluates):
        assert "rank 0 evaluates and gathers the dense weights; rank 1 trains and gathers the dense weights" in error
        assert "drop_last=True" in error


def save(folder: str) -> dict[str, Any]:
    """Two steps, saved whole, then a third."""
    module = build(in_blocks=True)
    engine = sml.SwiftMoEEngine(module, CONFIG)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))
    for step in range(3):
        if step == 2:
            saved = {"model": engine.full_state_dict(), "optimizer": full_state(optimizer.state_dict(), keep=True)}
            torch.save({**saved, "engine": engine.state_dict()}, f"{folder}/{dist.get_rank()}.pt")
        loss_of(model, step, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


def resume(path: str, mode: str) -> dict[str, Any]:
    """The third step, after a load; with dense="fsdp2" into parameters that are cut already."""
    module = build(in_blocks=True)
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(dense=mode))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))
    saved = torch.load(path, weights_only=True)
    module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    engine.load_state_dict(saved["engine"])
    loss_of(model, 2, 0).backward()
    optimizer.step()
    return engine.full_state_dict()


@pytest.mark.parametrize(("world_size", "mode"), [(2, "fsdp2"), (3, "fsdp2"), (3, "ddp")])
def test_whole_files_go_on_at_another_world_size_and_under_ddp(tmp_path: Path, world_size: int, mode: str) -> None:
    (expected, _) = run_ranks(save, 2, str(tmp_path))
    for state in run_ranks(resume, world_size, str(tmp_path / "0.pt"), mode):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-11, atol=1e-12, msg=name)


def prepare_too_early(cut_first: bool) -> None:
    module = build(in_blocks=True)
    engine = sml.SwiftMoEEngine(module, CONFIG)
    optimizer = torch.optim.AdamW(module.parameters())
    if cut_first:
        engine.data_parallel()
    engine.prepare_optimizer(optimizer)


@pytest.mark.parametrize("cut_first", [False, True])
def test_an_optimizer_from_before_the_cut_is_refused_with_the_fix(cut_first: bool) -> None:
    for error in rank_errors(prepare_too_early, 2, cut_first):
        assert "Call engine.data_parallel() first, then make the optimizer" in error


def use_muon() -> None:
    module = build(in_blocks=True)
    engine = sml.SwiftMoEEngine(module, CONFIG)
    engine.data_parallel()
    engine.prepare_optimizer(torch.optim.Muon([p for p in module.parameters() if p.dim() == 2]))


def test_an_optimizer_that_needs_whole_tensors_is_refused_for_cut_dense_parameters() -> None:
    for error in rank_errors(use_muon, 2):
        assert "Muon cannot update shards" in error
        assert "sml.Muon(sml.muon_groups(model)) updates experts and dense matrices that are cut" in error


def test_on_one_process_the_module_stays_as_it_is() -> None:
    module = models.build()
    engine = sml.SwiftMoEEngine(module, CONFIG)
    assert engine.data_parallel() is module
    assert not any(isinstance(p, DTensor) for p in module.parameters())


def wrap_cut_module() -> None:
    module = build(in_blocks=True)
    before = vars(module).keys()
    engine = sml.SwiftMoEEngine(module, CONFIG)
    model = engine.data_parallel()
    assert model.module is module
    assert model.engine is engine
    # What FSDP2 itself keeps there is not ours.
    added = {key: value for key, value in vars(module).items() if key not in before}
    assert not [
        key for key, value in added.items() if "swiftmoe" in getattr(value, "__module__", type(value).__module__)
    ]
    with pytest.raises(AssertionError, match="FSDP does not support deepcopy"):
        copy.deepcopy(model)


def test_the_cut_module_is_wrapped_and_gets_no_attributes_of_ours() -> None:
    run_ranks(wrap_cut_module, 2)


def gathered_modules() -> list[str]:
    """Lists inside lists, a layer in two places, and layers outside any list."""
    layer = nn.Linear(4, 4)
    stages = nn.ModuleList([nn.ModuleList([layer, nn.Linear(4, 4)]), nn.ModuleList([layer])])
    module = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(4, 4), sml.MoE(4, 6, 2, 1)), "stages": stages})
    root = nn.Sequential(nn.Linear(4, 4), module)
    sml.SwiftMoEEngine(root, CONFIG).data_parallel()
    return [name for name, m in root.named_modules() if isinstance(m, FSDPModule)]


def test_the_children_of_the_outermost_lists_are_gathered_by_themselves() -> None:
    for names in run_ranks(gathered_modules, 2):
        assert names == ["", "1.stages.0.0", "1.stages.0.1"]
