"""Tokens that travel at two levels train like tokens that travel at one, and like one process."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine import direct_exchange
from swiftmoe_lightning.engine.checkpoint import full_state
from swiftmoe_lightning.modules.two_level import TwoLevelDispatcher
from swiftmoe_lightning.placement import Capacity, NodePlan
from tests.engine import dense, models
from tests.engine.test_expert_groups import train as train_steps
from tests.engine.test_matches_dense_reference import relative_error
from tests.helpers import nightly, run_ranks

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-11}
DIM, EXPERTS, TOKENS = 6, 5, 40


def always() -> Any:
    """Two levels in every forward, also in those where they would send more."""
    return patch.object(NodePlan, "pays", lambda *_: True)


def train(dtype: torch.dtype, options: dict[str, Any]) -> dict[str, Tensor]:
    """`dense.train_dense`, spread over nodes of two ranks."""
    settings = {"placement": models.RandomPolicy, "slots_per_rank": 4, "exchange": "two_level", **options}
    engine = sml.SwiftMoEEngine(models.build(dtype), sml.SwiftMoEConfig(**settings), ranks_per_node=2)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(engine.module.parameters(), lr=1e-2))
    with always():
        train_steps(engine, model, optimizer, range(dense.STEPS), dtype)
    assert (engine.group.nodes is None) == ("expert_parallel_size" in options)
    return engine.full_state_dict()


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *nightly((torch.float32, {}), (torch.float64, {"reshard_after_forward": True, "offload_optimizer": True})),
        (torch.float64, {}),
    ],
)
def test_thirty_steps_equal_a_dense_single_process(dtype: torch.dtype, options: dict[str, Any]) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), dtype)
    for state in run_ranks(train, 4, dtype, options):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= TOLERANCES[dtype], errors


def test_groups_of_one_node_stay_flat_and_train_alike() -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), torch.float64)
    for state in run_ranks(train, 4, torch.float64, {"expert_parallel_size": 2}):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= TOLERANCES[torch.float64], errors


def routed(top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens, expert ids (some unassigned) and weights: differently many on each rank, none on rank 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, DIM, generator=generator, dtype=dtype)
    ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :top_k]
    ids[::7, 0] = -1
    weights = torch.rand(TOKENS, top_k, generator=generator, dtype=dtype)
    starts = [0, 15, 15, 33, TOKENS] if dist.is_initialized() else [0, TOKENS]
    mine = list(pairwise(starts))[dist.get_rank() if dist.is_initialized() else 0]
    return tuple(t[slice(*mine)] for t in (x, ids, weights))  # type: ignore[return-value]


def forward_and_backward(
    exchange: str, top_k: int, dtype: torch.dtype, options: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """Output and all gradients of one layer, the bytes of tokens, and how often tokens travelled at two levels."""
    torch.manual_seed(0)
    capacity = options.get("capacity")
    experts = sml.Experts(EXPERTS, DIM, 8, bias=True, capacity=capacity, dtype=dtype)
    config = sml.SwiftMoEConfig(slots_per_rank=2, placement="packed", exchange=exchange)
    engine = sml.SwiftMoEEngine(experts, config, ranks_per_node=2)
    x, ids, weights = routed(top_k, dtype)
    x.requires_grad_(options.get("needs_input_gradient", True))
    weights.requires_grad_()
    dispatches = []
    dispatch = TwoLevelDispatcher.dispatch

    def counted(self: TwoLevelDispatcher, x_TD: Tensor) -> Any:
        dispatches.append(1)
        return dispatch(self, x_TD)

    with patch.object(TwoLevelDispatcher, "dispatch", counted), always():
        if options.get("recomputes"):
            out = checkpoint(experts, x, ids, weights, use_reentrant=False)
        else:
            out = experts(x, ids, weights)
        # The same loss for all ways to spread tokens: a sum, which the mean over ranks divides by their number.
        (out * torch.linspace(-1, 1, DIM, dtype=dtype)).sum().backward()
    scale = dist.get_world_size() if dist.is_initialized() else 1
    gradients = {name: p.grad.full_tensor() if scale > 1 else p.grad for name, p in experts.named_parameters()}
    values = {name: gradient * scale for name, gradient in gradients.items()}
    values |= {"out": out.detach(), "weights": weights.grad}
    if x.requires_grad:
        values["x"] = x.grad
    return values, {} if engine.group is None else engine.group.token_bytes, len(dispatches)


CASES = [
    (2, {}),
    (3, {}),
    (1, {}),
    (2, {"needs_input_gradient": False}),
    (3, {"recomputes": True}),
    (3, {"capacity": Capacity(1.0)}),
    (2, {"capacity": Capacity(0.7, "slot")}),
]


def all_cases(exchange: str, dtype: torch.dtype) -> list[Any]:
    return [forward_and_backward(exchange, top_k, dtype, options) for top_k, options in CASES]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_outputs_and_gradients_equal_those_of_the_flat_exchange_and_of_one_process(dtype: torch.dtype) -> None:
    ranks, flat_ranks = run_ranks(all_cases, 4, "two_level", dtype), run_ranks(all_cases, 4, "flat", dtype)
    compared = {"rtol": TOLERANCES[dtype], "atol": TOLERANCES[dtype]}
    for case, (top_k, options) in enumerate(CASES):
        if "capacity" not in options:
            alone, _, _ = forward_and_backward("flat", top_k, dtype, options)
            for name, expected in alone.items():
                parts = [rank[case][0][name] for rank in ranks]
                whole = torch.cat(parts) if name in ("x", "out", "weights") else parts[0]
                torch.testing.assert_close(whole, expected, **compared)
        for rank, flat in zip(ranks, flat_ranks, strict=True):
            values, _, num_dispatches = rank[case]
            assert num_dispatches == (2 if options.get("recomputes") else 1)
            assert flat[case][2] == 0
            for name, expected in flat[case][0].items():
                torch.testing.assert_close(values[name], expected, **compared)


def test_bfloat16_tokens_keep_the_precision_of_the_flat_exchange() -> None:
    args = (3, torch.bfloat16, {})
    ranks = [run_ranks(forward_and_backward, 4, exchange, *args) for exchange in ("two_level", "flat")]
    for (values, _, _), (flat, _, _) in zip(*ranks, strict=True):
        for name, expected in flat.items():
            torch.testing.assert_close(values[name], expected, rtol=0.05, atol=0.05)


def bytes_of_tokens(exchange: str) -> tuple[dict[str, int], list[Any]]:
    """Bytes of a forward and backward with wide tokens, and what the plan says of all ranks' rows in one exchange."""
    torch.manual_seed(dist.get_rank())
    experts = sml.Experts(8, 256, 4)
    config = sml.SwiftMoEConfig(slots_per_rank=2, placement="static", exchange=exchange)
    engine = sml.SwiftMoEEngine(experts, config, ranks_per_node=2)
    plans = []
    pays = NodePlan.pays

    def kept(self: NodePlan, *args: Any) -> bool:
        plans.append((self.flat, self.two_level))
        return pays(self, *args)

    with patch.object(NodePlan, "pays", kept):
        ids = torch.rand(64, 8).argsort(-1)[:, :4]
        weights = torch.rand(64, 4, requires_grad=True)
        experts(torch.randn(64, 256, requires_grad=True), ids, weights).sum().backward()
    return engine.group.token_bytes, plans


def test_bytes_on_each_kind_of_link_are_the_plans() -> None:
    two_level, flat = (run_ranks(bytes_of_tokens, 4, exchange) for exchange in ("two_level", "flat"))
    rows_flat, rows = two_level[0][1][0]
    total = {link: [sum(rank[0][link] for rank in ranks) for ranks in (flat, two_level)] for link in flat[0][0]}
    # There and back, forward and backward, 256 numbers of 4 bytes; labels are 4 numbers of 4 bytes, and as many for
    # their pairs. Weights' gradients come back in backward.
    assert total["inside"] == [rows_flat.inside * 4096, rows.inside * 4096]
    assert total["between"] == [rows_flat.between * 4096, rows.between * (4096 + 16 + 16 + 16)]
    # A token with 4 of 8 experts on 2 nodes has 2 assignments on the other one, and almost always one at least.
    assert total["between"][1] < 0.55 * total["between"][0]


def ways_of(top_k: int, dim: int) -> list[bool]:
    """Whether tokens of this width travel at two levels, on links that are infinitely, and hardly, faster inside."""
    experts = sml.Experts(8, dim, 4)
    engine = sml.SwiftMoEEngine(experts, sml.SwiftMoEConfig(slots_per_rank=2, exchange="two_level"), ranks_per_node=2)
    (layer,), rail = engine.layers, engine.group.nodes.rail
    generator = torch.Generator().manual_seed(dist.get_rank())
    ids = torch.rand(64, 8, generator=generator).argsort(-1)[:, :top_k]
    taken = []
    for ratio in (math.inf, 1.5):
        layer.nodes = replace(engine.group.nodes, speed_ratio=ratio)
        before = rail.bytes_to_others_n.sum()
        experts(torch.randn(64, dim), ids, torch.rand(64, top_k))
        taken.append(bool(rail.bytes_to_others_n.sum() > before))
    # Nothing to save in any forward: the layer does not ask again.
    assert (layer.nodes is None) == (top_k == 1)
    return taken


@pytest.mark.parametrize(
    ("top_k", "dim", "expected"),
    # One expert a token: nothing to save. Narrow tokens: labels are more than what is saved.
    [(2, 64, [True, False]), (1, 64, [False, False]), (2, 2, [False, False])],
)
def test_each_forward_takes_the_cheaper_way_on_all_ranks(top_k: int, dim: int, expected: list[bool]) -> None:
    assert run_ranks(ways_of, 4, top_k, dim) == [expected] * 4


def evaluate_unevenly(num_batches: list[int]) -> list[Tensor]:
    """Forward of each rank's own batches; ranks have differently many, of different sizes."""
    rank = dist.get_rank()
    module = models.build(torch.float64)
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(exchange="two_level"), ranks_per_node=2)
    with torch.no_grad(), always():
        outputs = [module(dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]) for i in range(num_batches[rank])]
        engine.join()
    return outputs


def test_ranks_without_batches_relay_the_tokens_of_others() -> None:
    num_batches = [2, 0, 3, 1]
    weights = models.build(torch.float64).state_dict()
    for rank, outputs in enumerate(run_ranks(evaluate_unevenly, 4, num_batches)):
        assert len(outputs) == num_batches[rank]
        for i, output in enumerate(outputs):
            x = dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]
            torch.testing.assert_close(output, dense.dense_forward(weights, x), rtol=1e-12, atol=1e-14)


def weights_of_two_steps(exchange: str, least_message: int) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Bytes of weights and gradients by link, of a rank on one of two nodes; and the final parameters."""
    torch.manual_seed(0)
    module = sml.MoE(dim=8, hidden_dim=8, num_experts=4, top_k=1, activation="relu2")
    config = sml.SwiftMoEConfig(slots_per_rank=4, placement="packed", exchange=exchange)
    with patch.object(direct_exchange, "_LEAST_MESSAGE", least_message):
        engine = sml.SwiftMoEEngine(module, config, ranks_per_node=2)
        model = engine.data_parallel()
        optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
        for step in range(2):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(4 * step + dist.get_rank()))
            model(x).square().sum().backward()
            optimizer.step()
        engine.wait_for_weights()
    return engine.group.weight_bytes, engine.full_state_dict()


@pytest.mark.parametrize("least_message", [0, *nightly(10**9)], ids=["direct", "packed"])
def test_fewer_weights_leave_nodes_and_all_are_the_same(least_message: int) -> None:
    flat = run_ranks(weights_of_two_steps, 4, "flat", least_message)
    two_level = run_ranks(weights_of_two_steps, 4, "two_level", least_message)
    between = [sum(sent["between"] for sent, _ in ranks) for ranks in (flat, two_level)]
    # All ranks have all 4 experts of 128 elements. Each owns 32 of each, which it sends to 2 ranks of the other node,
    # or to 1; in 4 bytes, in two collections and three distributions.
    assert between == [5 * 4 * (4 * 32) * ranks_of_node * 4 for ranks_of_node in (2, 1)]
    for _, state in two_level:
        for name, value in flat[0][1].items():
            torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6)


def save_or_load(path: str, exchange: str, saves: bool) -> dict[str, Tensor]:
    settings = {"placement": models.RandomPolicy, "slots_per_rank": 4, "exchange": exchange}
    engine = sml.SwiftMoEEngine(models.build(torch.float64), sml.SwiftMoEConfig(**settings), ranks_per_node=2)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(engine.module.parameters(), lr=1e-2))
    if not saves:
        saved = torch.load(path, weights_only=True)
        engine.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    for step in range(2) if saves else range(2, 4):
        batch = dense.batch(step, 0, torch.float64)
        x, target = (models.my_part(t, dist.get_rank(), dist.get_world_size()) for t in batch)
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = full_state({"model": engine.module.state_dict(), "optimizer": optimizer.state_dict()}, keep=True)
    if saves and dist.get_rank() == 0:
        torch.save(state, path)
    return state["model"]


@pytest.mark.nightly
def test_a_run_resumes_at_the_other_number_of_levels(tmp_path: Path) -> None:
    finals = []
    for first, second in (("flat", "flat"), ("two_level", "flat"), ("flat", "two_level")):
        path = str(tmp_path / f"{first}-{second}.pt")
        run_ranks(save_or_load, 4, path, first, True)
        finals.append(run_ranks(save_or_load, 4, path, second, False)[0])
    for final in finals[1:]:
        for name, value in finals[0].items():
            torch.testing.assert_close(final[name], value, rtol=1e-9, atol=1e-11)
