"""Accelerate's `ParallelismConfig`: what its axes ask of the engine, and that a loop on them trains as one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, TensorDataset

import swiftmoe_lightning as sml
from swiftmoe_lightning.accelerate.parallel_axes import parallel_axes
from tests.engine import dense, models
from tests.engine.test_matches_dense_reference import relative_error
from tests.engine.test_tensor_parallel import WithMLP
from tests.helpers import nightly, run_ranks
from tests.huggingface import test_trainer as test_hf_trainer

STEPS = 5


@pytest.mark.parametrize(
    ("sizes", "dense_mode", "group_size", "tensor_mesh"),
    [
        ({}, "ddp", None, ()),
        ({"dp_replicate": 8}, "ddp", None, ()),
        ({"dp_shard": 8}, "fsdp2", None, ()),
        ({"cp": 2}, "fsdp2", None, ()),
        ({"dp_shard": 4, "cp": 2}, "fsdp2", None, ()),
        ({"dp_replicate": 2, "dp_shard": 2, "cp": 2}, "hsdp", 4, ()),
        ({"tp": 8}, "ddp", None, ("tp",)),
        ({"dp_shard": 4, "tp": 2}, "fsdp2", None, ("dp_shard", "tp")),
        ({"cp": 4, "tp": 2}, "fsdp2", None, ("cp", "tp")),
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2}, "hsdp", None, ("dp_replicate", "dp_shard", "tp")),
    ],
    ids=str,
)
def test_what_axes_ask_of_the_engine(
    sizes: dict[str, int], dense_mode: str, group_size: int | None, tensor_mesh: tuple[str, ...]
) -> None:
    axes = parallel_axes(sizes, sml.SwiftMoEConfig())
    assert (axes.config.dense, axes.config.expert_parallel_size) == (dense_mode, group_size)
    assert axes.tensor_mesh == tensor_mesh


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"sp": 2}, "sp_size=2 is DeepSpeed's sequence parallelism.*Use cp_size"),
        ({"dp_replicate": 2, "tp": 2}, "Set dp_shard_size in place of dp_replicate_size"),
        ({"dp_replicate": 2, "dp_shard": 2}, "expert_parallel_size=3, and each of the 2 copies.*over 2 processes"),
        ({"dp_shard": 2, "cp": 2, "tp": 2}, "cut over one axis beside tp. Set dp_shard_size or cp_size to 1"),
    ],
    ids=str,
)
def test_axes_that_do_not_go_together_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parallel_axes(sizes, sml.SwiftMoEConfig(expert_parallel_size=3))


def accelerator_on(axes: dict[str, int], kind: str = "MULTI_CPU") -> Accelerator:
    """One with these axes, as Accelerate makes it for GPUs; it refuses to without."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    made = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if axes:
        set_axes(made, axes)
        made.state.distributed_type = DistributedType[kind]
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2) if kind == "FSDP" else None
    return made


def set_axes(accelerator: Accelerator, axes: dict[str, int]) -> None:
    parallelism = ParallelismConfig(**axes)
    accelerator.state.parallelism_config = parallelism
    accelerator.state.device_mesh = parallelism.get_device_mesh("cpu")


def train(axes: dict[str, int]) -> dict[str, Tensor]:
    """AdamW, two micro-batches a step, clipped. The loader deals global batches to the data-parallel ranks."""
    accelerator = accelerator_on(axes)
    model = WithMLP(torch.float64)
    if axes.get("tp_size", 1) > 1:
        mesh = accelerator.torch_device_mesh["tp"]
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    num_data_ranks = axes.get("dp_replicate_size", 1) * axes.get("dp_shard_size", 1)
    parts = [dense.batch(step, 0, torch.float64) for step in range(2 * STEPS)]
    data = TensorDataset(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    config = sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4 if axes else None)
    wrapped, optimizer, loader = sml.accelerate.prepare(
        accelerator,
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        DataLoader(data, dense.TOKENS // num_data_ranks),
        config=config,
    )
    for x, target in loader:
        with accelerator.accumulate(wrapped):
            accelerator.backward(F.mse_loss(wrapped(x), target))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()
    assert not axes or all(isinstance(p, DTensor) for p in model.parameters()) or axes == {"tp_size": 2}
    return {name: value.clone() for name, value in accelerator.get_state_dict(wrapped).items()}


@pytest.mark.parametrize(
    "axes",
    [
        {"dp_shard_size": 2, "tp_size": 2},
        {"dp_replicate_size": 2, "dp_shard_size": 2},
        *nightly({"tp_size": 2}, {"dp_shard_size": 3}),
    ],
    ids=str,
)
def test_a_loop_on_axes_trains_like_one_process(axes: dict[str, int]) -> None:
    (expected,) = run_ranks(train, 1, {})
    num_ranks = axes.get("dp_replicate_size", 1) * axes.get("dp_shard_size", 1) * axes.get("tp_size", 1)
    for state in run_ranks(train, num_ranks, axes, init=False):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert state.keys() == expected.keys()
        assert max(errors.values()) <= 1e-9, errors


def train_with_trainer(folder: str, axes: dict[str, int]) -> dict[str, Any]:
    made = test_hf_trainer.trainer(folder, max_grad_norm=0.5, gradient_accumulation_steps=2)
    if axes:
        set_axes(made.accelerator, axes)
    made.train()
    assert (made.engine.dense is not None) == bool(axes)
    return test_hf_trainer.result(made)


def test_the_trainer_of_transformers_cuts_the_dense_part_as_its_axes_say(tmp_path: Path) -> None:
    (expected, _) = run_ranks(train_with_trainer, 2, str(tmp_path / "whole"), {}, init=False)
    for actual in run_ranks(train_with_trainer, 2, str(tmp_path / "cut"), {"dp_shard_size": 2}, init=False):
        test_hf_trainer.same("cut", actual, expected)


class GatherSequence(torch.autograd.Function):
    """Each rank's [B, T, D] -> those of all ranks, along T. Backward adds up the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(dist.get_world_size(ctx.group), dim=1)[dist.get_rank(ctx.group)], None


class CausalLayer(nn.Module):
    """Attention of one head, then experts. Under context parallelism keys and values of all ranks are gathered."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(dense.DIM, 3 * dense.DIM, dtype=torch.float64)
        self.moe = sml.MoE(dense.DIM, 7, 5, 2, aux_loss_coef=0.1, dtype=torch.float64)

    def forward(self, x_BTD: Tensor, position_BT: Tensor, group: Any) -> Tensor:
        query, key, value = self.qkv(x_BTD).chunk(3, dim=-1)
        position = position_BT
        if group is not None:
            key, value, position = (GatherSequence.apply(t, group) for t in (key, value, position_BT))
        scores = query @ key.transpose(1, 2) / dense.DIM**0.5
        masked = scores.masked_fill(position_BT[:, :, None] < position[:, None, :], float("-inf"))
        hidden = x_BTD + masked.softmax(-1) @ value
        return hidden + self.moe(hidden)


def train_sequences(axes: dict[str, int], kind: str) -> dict[str, Tensor]:
    """AdamW on global batches of 4 sequences of 8 tokens, which Accelerate's own context manager cuts."""
    accelerator = accelerator_on(axes, kind)
    model = CausalLayer()
    wrapped, optimizer = sml.accelerate.prepare(
        accelerator,
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4 if axes else None),
    )
    num_data_ranks = axes.get("dp_shard_size", 1)
    group = accelerator.torch_device_mesh["cp"].get_group() if axes else None
    data_rank = accelerator.process_index // 2 if axes else 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(2 * STEPS):
        x, target = torch.randn(2, 4, 8, dense.DIM, generator=generator, dtype=torch.float64)
        x, target = (models.my_part(t, data_rank, num_data_ranks).clone() for t in (x, target))
        position = torch.arange(8).repeat(len(x), 1)
        with (
            accelerator.accumulate(wrapped),
            accelerator.maybe_context_parallel(buffers=[x, target, position], buffer_seq_dims=[1, 1, 1]),
        ):
            assert x.shape[1] == (4 if axes else 8)
            loss = F.mse_loss(wrapped(x, position, group), target) + sml.auxiliary_loss(wrapped)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.2)
            optimizer.step()
            optimizer.zero_grad()
    return {name: value.clone() for name, value in accelerator.get_state_dict(wrapped).items()}


@pytest.mark.parametrize(
    ("axes", "kind"),
    [
        ({"cp_size": 2}, "MULTI_CPU"),
        # On GPUs, Accelerate turns context parallelism into its FSDP.
        ({"cp_size": 2, "dp_shard_size": 2}, "FSDP"),
    ],
    ids=str,
)
def test_ranks_with_parts_of_a_sequence_train_like_one_process(axes: dict[str, int], kind: str) -> None:
    (expected,) = run_ranks(train_sequences, 1, {}, "NO")
    for state in run_ranks(train_sequences, 2 * axes.get("dp_shard_size", 1), axes, kind, init=False):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-9, errors
