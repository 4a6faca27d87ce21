"""Tokens that travel in bfloat16 or fp8: W ranks equal one process that rounds in the same places."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from swiftmoe_lightning.modules.context import SingleDeviceContext
from swiftmoe_lightning.placement import Capacity, NodePlan
from tests.distributed.test_wire import BF16, FP8, rounded
from tests.engine import dense, models
from tests.engine.test_matches_dense_reference import relative_error
from tests.helpers import nightly, rank_errors, run_ranks

# In float64 two orders of sums differ by less than a step of the rounding, so that all round alike.
DTYPE, TOLERANCE = torch.float64, 1e-11
DIM, EXPERTS, TOKENS = 6, 4, 40
NAMES = {BF16: "bfloat16", FP8: "float8_e4m3fn"}


class Rounded(torch.autograd.Function):
    """Rounds rows on their way there, and their gradients on the way back to bfloat16."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, dtype: torch.dtype | None) -> Tensor:
        ctx.dtype = None if dtype is None else BF16
        return rounded(rows, dtype).clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return rounded(grad, ctx.dtype), None


class RoundingContext(SingleDeviceContext):
    """One device, whose rows are rounded as if they travelled."""

    def exchange_rows(self, rows_RD: Tensor, *_: Any) -> Tensor:
        rows: Tensor = Rounded.apply(rows_RD, _[-1])
        return rows


def in_one_process(
    weights: dict[str, Tensor], x: Tensor, ids: Tensor, gates: Tensor, token_dtype: torch.dtype, num_nodes: int
) -> Tensor:
    """The experts as loops. num_nodes: those of one node are summed there, and the sum is rounded; 0 is flat."""
    out = torch.zeros_like(x)
    for node in range(max(num_nodes, 1)):
        x_node = Rounded.apply(x, token_dtype) if num_nodes else x
        total = torch.zeros_like(x)
        for k in range(ids.shape[1]):
            x_k = Rounded.apply(x_node, token_dtype)
            for expert in range(EXPERTS):
                if not num_nodes or expert * num_nodes // EXPERTS == node:
                    y = Rounded.apply(dense.dense_expert(weights, "experts", expert, x_k), BF16)
                    total = total + torch.where(ids[:, k : k + 1] == expert, gates[:, k : k + 1] * y, 0)
        out = out + (Rounded.apply(total, BF16) if num_nodes else total)
    return out


def routed(top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """All ranks' tokens, some of them zero, large or small; expert ids, some unassigned; and gates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, DIM, generator=generator, dtype=DTYPE)
    x[3], x[9], x[20] = 0, 100 * x[9], x[20] / 1000
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :top_k]
    ids[::7, 0] = -1
    return x, ids, torch.rand(TOKENS, top_k, generator=generator, dtype=DTYPE)


def parts() -> list[tuple[int, int]]:
    """Which tokens each rank has; rank 1 has none."""
    starts = {2: [0, TOKENS, TOKENS], 4: [0, 15, 15, 33, TOKENS]}[dist.get_world_size()]
    return list(pairwise(starts))


def one_layer(token_dtype: torch.dtype, exchange: str, top_k: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """Output and gradients of a layer whose expert e is on rank e of 4; of 2 ranks with replicas."""
    torch.manual_seed(0)
    experts = sml.Experts(EXPERTS, DIM, 8, capacity=options.get("capacity"), dtype=DTYPE)
    slots, placement = (1, "static") if dist.get_world_size() == 4 else (3, "packed")
    settings = {"slots_per_rank": slots, "placement": placement, "exchange": exchange}
    engine = sml.SwiftMoEEngine(
        experts, sml.SwiftMoEConfig(token_dtype=NAMES[token_dtype], **settings), ranks_per_node=2
    )
    x, ids, gates = (t[slice(*parts()[dist.get_rank()])] for t in routed(top_k))
    x.requires_grad_(), gates.requires_grad_()
    with patch.object(NodePlan, "pays", lambda *_: True):
        if options.get("recomputes"):
            out = checkpoint(experts, x, ids, gates, use_reentrant=False)
        else:
            out = experts(x, ids, gates)
        (out * torch.linspace(-1, 1, DIM, dtype=DTYPE)).sum().backward()
    assert (engine.group.nodes is not None) == (exchange == "two_level")
    gradients = {name: p.grad.full_tensor() * dist.get_world_size() for name, p in experts.named_parameters()}
    return {"out": out.detach(), "x": x.grad, "gates": gates.grad, **gradients}


CASES: list[tuple[torch.dtype, str, int, dict[str, Any]]] = [
    (FP8, "flat", 2, {}),
    (BF16, "flat", 3, {}),
    (FP8, "flat", 3, {"recomputes": True}),
    (FP8, "flat", 1, {"capacity": Capacity(0.7)}),
    (FP8, "two_level", 3, {}),
    (BF16, "two_level", 2, {"recomputes": True}),
]


def poisoned(token_dtype: torch.dtype) -> list[int]:
    """Which of this rank's tokens have results that are not finite, where the 5th of all has one number that is not."""
    torch.manual_seed(0)
    experts = sml.Experts(EXPERTS, DIM, 8, dtype=DTYPE)
    sml.SwiftMoEEngine(experts, sml.SwiftMoEConfig(token_dtype=NAMES[token_dtype]))
    x, ids, gates = routed(2)
    x[4, 1] = float("inf")
    out = experts(*(t[slice(*parts()[dist.get_rank()])] for t in (x, ids, gates)))
    return (~out.isfinite().all(1)).nonzero().flatten().tolist()


def evaluate_unevenly(num_batches: list[int]) -> list[Tensor]:
    """Of each rank's own batches, of different sizes; ranks that have none left serve the others."""
    torch.manual_seed(0)
    experts = sml.Experts(EXPERTS, DIM, 8, dtype=DTYPE)
    engine = sml.SwiftMoEEngine(experts, sml.SwiftMoEConfig(token_dtype="float8_e4m3fn"))
    with torch.no_grad():
        outputs = [experts(*(t[: 5 + 9 * i] for t in routed(2))) for i in range(num_batches[dist.get_rank()])]
        engine.join()
    return outputs


BATCHES = [2, 0, 3, 1]


def all_cases() -> tuple[list[dict[str, Tensor]], list[list[int]], list[Tensor]]:
    cases = [one_layer(*case) for case in CASES if dist.get_world_size() == 4 or case[1] == "flat"]
    evaluated = evaluate_unevenly(BATCHES) if dist.get_world_size() == 4 else []
    return cases, [poisoned(token_dtype) for token_dtype in NAMES], evaluated


def parameters() -> dict[str, Tensor]:
    torch.manual_seed(0)
    experts = sml.Experts(EXPERTS, DIM, 8, dtype=DTYPE)
    return {f"experts.{name}": p.detach().clone().requires_grad_() for name, p in experts.named_parameters()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layer_equals_one_process_that_rounds_in_the_same_places(world_size: int) -> None:
    ranks = run_ranks(all_cases, world_size)
    cases = [case for case in CASES if world_size == 4 or case[1] == "flat"]
    for i, (token_dtype, exchange, top_k, options) in enumerate(cases):
        whole = {name: torch.cat([rank[0][i][name] for rank in ranks]) for name in ("out", "x", "gates")}
        weights = parameters()
        x, ids, gates = routed(top_k)
        if "capacity" in options:
            dropped = (whole["out"] == 0).all(1) & (ids[:, 0] >= 0) & (x != 0).any(1)
            assert 0 < dropped.sum() < TOKENS / 2
            ids[dropped] = -1
        x.requires_grad_(), gates.requires_grad_()
        out = in_one_process(weights, x, ids, gates, token_dtype, 2 if exchange == "two_level" else 0)
        (out * torch.linspace(-1, 1, DIM, dtype=DTYPE)).sum().backward()
        expected = {"out": out.detach(), "x": x.grad, "gates": gates.grad}
        expected |= {name.removeprefix("experts."): p.grad for name, p in weights.items()}
        for rank in ranks:
            for name, value in expected.items():
                actual = whole.get(name, rank[0][i][name])
                torch.testing.assert_close(actual, value, rtol=TOLERANCE, atol=TOLERANCE)
    # Not hidden, and no other token's.
    assert [rank[1] for rank in ranks] == [[[4], [4]]] + [[[], []]] * (world_size - 1)
    for num_batches, (_, _, evaluated) in zip(BATCHES, ranks if world_size == 4 else [], strict=False):
        for size, output in zip(range(5, 5 + 9 * num_batches, 9), evaluated, strict=True):
            expected_out = in_one_process(parameters(), *(t[:size] for t in routed(2)), FP8, 0)
            torch.testing.assert_close(output, expected_out.detach(), rtol=TOLERANCE, atol=TOLERANCE)


def train(token_dtype: torch.dtype | None, shape: tuple[int, ...], compiles: bool) -> dict[str, Tensor]:
    """6 AdamW steps, each with another placement. shape: of the mesh, ranks of the same tokens last; () is one process
    that rounds."""
    torch.manual_seed(0)
    # One device asks its context for rows only where there is a capacity; this one drops nothing.
    model = models.build(DTYPE, capacity_factor=None if shape else 1.0, aux_loss_coef=0.1)
    mesh, part, num_parts = None, 0, 1
    if shape:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
        part, num_parts = dist.get_rank() // shape[1], shape[0]
    else:
        for module in model.modules():
            if isinstance(module, sml.Experts):
                module.context = RoundingContext(module.num_experts, module.expert_parameters)
                module.context.token_dtype = token_dtype
    settings = {"placement": models.RandomPolicy, "slots_per_rank": 4, "dense": "fsdp2"} if shape else {}
    config = sml.SwiftMoEConfig(token_dtype=NAMES.get(token_dtype), **settings)
    engine = sml.SwiftMoEEngine(model, config, tensor_mesh=mesh)
    wrapped = engine.data_parallel()
    forward = torch.compile(wrapped, backend="aot_eager") if compiles else wrapped
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(6):
        x, target = (models.my_part(t, part, num_parts) for t in dense.batch(step, 0, DTYPE))
        (F.mse_loss(forward(x), target) + sml.auxiliary_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return engine.full_state_dict()


@pytest.mark.parametrize(
    ("shape", "token_dtype", "compiles"),
    [((2, 1), FP8, True), ((2, 2), FP8, False), *nightly(((2, 1), BF16, False))],
    ids=str,
)
def test_training_equals_one_process_that_rounds(shape: Any, token_dtype: torch.dtype, compiles: bool) -> None:
    expected, as_is = train(token_dtype, (), False), train(None, (), False)
    assert max(relative_error(as_is[name], expected[name]) for name in expected) > 1e-4
    for state in run_ranks(train, shape[0] * shape[1], token_dtype, shape, compiles):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= TOLERANCE, errors


def bytes_of_tokens(token_dtype: str | None, dtype: torch.dtype, autocast: bool) -> tuple[int, int]:
    """(Rows that leave this rank for their experts, or come back; bytes of forward and backward.)"""
    rank, size = dist.get_rank(), dist.get_world_size()
    experts = sml.Experts(EXPERTS, DIM, 8, dtype=dtype)
    config = sml.SwiftMoEConfig(slots_per_rank=EXPERTS // size, placement="static", token_dtype=token_dtype)
    engine = sml.SwiftMoEEngine(experts, config)
    x, ids, gates = (t[rank * 20 : rank * 20 + 20] for t in routed(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = experts(x.to(dtype).requires_grad_(), ids, gates.to(dtype))
    out.sum().backward()
    away = int(((ids >= 0) & (ids * size // EXPERTS != rank)).sum())
    return away, sum(engine.group.token_bytes.values())


WIRES = [
    # Bytes of a row there, and of a row back and of both gradients.
    (None, torch.float32, False, 4 * DIM, 4 * DIM),
    ("bfloat16", torch.float32, False, 2 * DIM, 2 * DIM),
    ("float8_e4m3fn", torch.float32, False, DIM + 4, 2 * DIM),
    ("float8_e4m3fn", torch.float32, True, DIM + 4, 2 * DIM),
    ("bfloat16", torch.float16, False, 2 * DIM, 2 * DIM),
]


def all_bytes() -> list[tuple[int, int]]:
    return [bytes_of_tokens(*wire[:3]) for wire in WIRES]


def test_bytes_are_the_formulas() -> None:
    for (*_, there, back), (mine, my_bytes), (others, other_bytes) in zip(WIRES, *run_ranks(all_bytes, 2), strict=True):
        # Of the rows to the other rank: there, and their results' gradients; of its rows: results, and gradients.
        assert mine > 0
        assert my_bytes == mine * (there + back) + others * 2 * back
        assert other_bytes == others * (there + back) + mine * 2 * back


def disagree(serves: bool) -> None:
    token_dtype = "bfloat16" if dist.get_rank() == 0 else None
    experts = sml.Experts(EXPERTS, DIM, 8, dtype=DTYPE)
    engine = sml.SwiftMoEEngine(experts, sml.SwiftMoEConfig(token_dtype=token_dtype))
    with torch.no_grad():
        if dist.get_rank() == 0 or not serves:
            experts(*routed(2))
        engine.join()


@pytest.mark.parametrize("serves", [False, True])
def test_ranks_with_different_settings_are_told(serves: bool) -> None:
    for error in rank_errors(disagree, 2, serves):
        assert "rank 0 has token_dtype='bfloat16', rank 1 has token_dtype=None. Give all ranks the same" in error
