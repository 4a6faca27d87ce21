"""A tensor-parallel dense part: ranks hold the same tokens, each computes a share of them, and all train as one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import swiftmoe_lightning as sml
from swiftmoe_lightning.distributed import RankGroup, gather_shares, take_share
from tests.engine import dense, models
from tests.engine.test_matches_dense_reference import relative_error
from tests.helpers import nightly, rank_errors, run_ranks


class WithMLP(torch.nn.Module):
    """The model of the dense reference, behind an MLP that can be tensor-parallel."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up = torch.nn.Linear(dense.DIM, 12, dtype=dtype)
        self.down = torch.nn.Linear(12, dense.DIM, dtype=dtype)
        self.rest = models.build(dtype, **options)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rest(x + self.down(self.up(x).relu()))
        return out


def train(shape: tuple[int, ...], size: int | None, mode: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """10 AdamW steps with clipping. shape: of the mesh, tensor-parallel ranks last; () is one process."""
    model = WithMLP(torch.float64, **options)
    mesh, data_rank, num_data_ranks = None, 0, 1
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp")[-len(shape) :])
        num_data_ranks = dist.get_world_size() // shape[-1]
        data_rank = dist.get_rank() // shape[-1]
        if shape[-1] > 1:
            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    config = sml.SwiftMoEConfig(
        placement=models.RandomPolicy,
        slots_per_rank=4 if (size or 1) > 1 else None,
        dense=mode,
        expert_parallel_size=size,
    )
    engine = sml.SwiftMoEEngine(model, config, tensor_mesh=mesh)
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(10):
        x, target = (models.my_part(t, data_rank, num_data_ranks) for t in dense.batch(step, 0, torch.float64))
        (F.mse_loss(wrapped(x), target) + sml.auxiliary_loss(model)).backward()
        engine.clip_grad_norm_(0.2)
        optimizer.step()
        optimizer.zero_grad()
    assert not shape or isinstance(model.up.weight, DTensor)
    state = {name: value.clone() for name, value in engine.full_state_dict().items()}
    # Whole values load into what is cut over both axes, and are what is gathered again.
    model.load_state_dict({name: value + 1 for name, value in state.items()})
    assert all(torch.equal(value, state[name] + 1) for name, value in engine.full_state_dict().items())
    return state


AUX = {"aux_loss_coef": 0.1, "z_loss_coef": 0.01}


@pytest.mark.parametrize(
    ("shape", "size", "mode", "options"),
    [
        ((1, 2), 2, "ddp", AUX),
        ((2, 2), 4, "fsdp2", AUX),
        # A group with one data rank: its auxiliary loss is of its own tokens.
        ((2, 2), 2, "fsdp2", {}),
        # Groups of ranks with the same tokens, and with a part of them.
        *nightly(((2, 2), 1, "fsdp2", {})),
        ((2, 1, 2), 4, "fsdp2", AUX),
    ],
    ids=str,
)
def test_it_trains_like_one_process(shape: Any, size: int, mode: str, options: dict[str, Any]) -> None:
    (expected,) = run_ranks(train, 1, (), None, "ddp", options)
    for state in run_ranks(
        train, shape[-2] * shape[-1] * (shape[0] if len(shape) > 2 else 1), shape, size, mode, options
    ):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-11, errors


def start_with_own_seeds() -> tuple[Tensor, Tensor]:
    """[12, DIM]: this rank's weight of a tensor-parallel layer before the engine, whole; and after the cut."""
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    model = WithMLP(torch.float64)
    torch.nn.init.normal_(model.up.weight, generator=torch.Generator().manual_seed(dist.get_rank()))
    own = model.up.weight.detach().clone()
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(dense="fsdp2"), tensor_mesh=mesh)
    engine.data_parallel()
    return own, engine.full_state_dict()["up.weight"]


def test_copies_of_tensor_parallel_parts_start_with_the_values_of_rank_zero() -> None:
    (first, _), *others = outcomes = run_ranks(start_with_own_seeds, 4)
    assert not any(torch.equal(own, first) for own, _ in others)
    assert all(torch.equal(cut, first) for _, cut in outcomes)


def share_and_gather(num_rows: int) -> tuple[list[float], list[float], list[float]]:
    ranks = RankGroup(dist.group.WORLD)
    rows = torch.arange(num_rows, dtype=torch.float64).view(-1, 1).requires_grad_()
    own = take_share(rows, ranks)
    whole = gather_shares(own * (1 + ranks.rank), num_rows, ranks)
    (whole * torch.arange(1, num_rows + 1).view(-1, 1)).sum().backward()
    assert rows.grad is not None
    # Nobody leaves before all have what they wait for.
    dist.barrier()
    return own.flatten().tolist(), whole.flatten().tolist(), rows.grad.flatten().tolist()


def test_literal_shares() -> None:
    for rank, (own, whole, gradient) in enumerate(run_ranks(share_and_gather, 3, 4)):
        # Two rows, two rows, none.
        assert own == [[0, 1], [2, 3], []][rank]
        assert whole == [0, 1, 4, 6]
        assert gradient == [1, 2, 6, 8]
    assert run_ranks(share_and_gather, 2, 0) == [([], [], [])] * 2


def refuse(case: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dist.barrier()
    sml.SwiftMoEEngine(models.build(), tensor_mesh=mesh["tp"] if case == "part" else mesh)


@pytest.mark.parametrize(
    ("case", "message"),
    [("part", "tensor_mesh must have names, all 4 ranks"), ("ddp", "dense='ddp' cannot average tensor-parallel")],
)
def test_what_does_not_fit_is_refused_on_every_rank(case: str, message: str) -> None:
    for error in rank_errors(refuse, 4, case):
        assert message in error, error
