"""Several expert groups, each with placements of its own, train like one process."""

from __future__ import annotations

import itertools
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine import checkpoint
from tests.engine import dense, models
from tests.engine.test_matches_dense_reference import relative_error
from tests.helpers import nightly, rank_errors, run_ranks


def build(size: int, dtype: torch.dtype = torch.float32, **options: Any) -> tuple[sml.SwiftMoEEngine, Any, Any]:
    module = models.build(dtype)
    if dist.get_rank():
        # Only rank 0's values may count.
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(dist.get_rank())
    slots = dense.NUM_EXPERTS if size == 1 else 4
    settings = {"placement": models.RandomPolicy, "slots_per_rank": slots, "expert_parallel_size": size, **options}
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(**settings))
    model = engine.data_parallel()
    return engine, model, engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), lr=1e-2))


def train(engine: sml.SwiftMoEEngine, model: Any, optimizer: Any, steps: range, dtype: torch.dtype) -> list[Any]:
    """`dense.train_dense`, spread. Returns the first layer's placement in every step."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    seen = []
    for step in steps:
        seen.append(engine.placements["1.experts"].slot_to_expert_S.tolist())
        for micro_batch in range(dense.MICRO_BATCHES):
            last = micro_batch == dense.MICRO_BATCHES - 1
            x, target = (models.my_part(t, rank, world_size) for t in dense.batch(step, micro_batch, dtype))
            with nullcontext() if last else model.no_sync():
                (F.mse_loss(model(x), target) / dense.MICRO_BATCHES).backward()
        engine.clip_grad_norm_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    return seen


def train_groups(size: int, dtype: torch.dtype, options: dict[str, Any]) -> tuple[dict[str, Tensor], list[Any]]:
    engine, model, optimizer = build(size, dtype, **options)
    seen = train(engine, model, optimizer, range(dense.STEPS), dtype)
    return engine.full_state_dict(), seen


@pytest.mark.parametrize(("world_size", "size"), [(4, 2), *nightly((4, 4), (4, 1)), (3, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [*nightly((torch.float32, 1e-5)), (torch.float64, 1e-12)])
def test_groups_with_placements_of_their_own_equal_a_dense_single_process(
    world_size: int, size: int, dtype: torch.dtype, tolerance: float
) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), dtype)
    ranks = run_ranks(train_groups, world_size, size, dtype, {})
    for state, _ in ranks:
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= tolerance, errors
    groups = [ranks[first][1] for first in range(0, world_size, size)]
    # Other tokens, so other placements, in every step after the first and in every group.
    for step in itertools.islice(zip(*groups, strict=True), 1, None):
        assert size == 1 or len(set(map(str, step))) == len(groups)


@pytest.mark.parametrize("mode", ["fsdp2", "hsdp"])
@pytest.mark.parametrize("size", [2, *nightly(4)])
def test_the_dense_part_may_be_cut_over_all_ranks_or_over_each_group(size: int, mode: str) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), torch.float64)
    for state, _ in run_ranks(train_groups, 4, size, torch.float64, {"dense": mode}):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-12, errors


def owned_elements() -> tuple[list[str], list[int]]:
    """How a parameter is cut over 2 groups of 2 ranks, and how many elements of it each rank owns."""
    engine, model, _ = build(2)
    shard = model.module[1].experts.gate_up_proj
    assert engine.group is not None
    numels = engine.group.all_gather(torch.tensor([shard.to_local().numel()])).flatten().tolist()
    return [str(placement) for placement in shard.placements], numels


def test_every_rank_owns_its_share_of_every_expert() -> None:
    # 5 experts of 14 rows of 10 elements. Ranks 0 and 1 are a group, 0 and 2 share the first 7 rows: 4 and 3.
    assert run_ranks(owned_elements, 4) == [(["S(1)", "S(1)"], [200, 200, 150, 150])] * 4


def bytes_of_two_steps() -> dict[str, int]:
    torch.manual_seed(dist.get_rank())
    module = sml.MoE(dim=8, hidden_dim=8, num_experts=4, top_k=1, activation="relu2")
    config = sml.SwiftMoEConfig(slots_per_rank=2, placement="static", expert_parallel_size=2, reduce_dtype="bfloat16")
    engine = sml.SwiftMoEEngine(module, config)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    for _ in range(2):
        model(torch.randn(16, 8)).sum().backward()
        optimizer.step()
    engine.wait_for_weights()
    return engine.traffic


def test_literal_bytes() -> None:
    # G = 128 elements an expert. Each rank of a group has d = 2 of the 4.
    # Each step sends d G (g - 1) / g = 128 elements in the group, and E G / g (R - 1) / R = 128 between groups;
    # gradients in 2 bytes, weights in 4, and weights once more before the first step.
    sent = {"collect": 2 * 256, "reduce": 2 * 256, "gather": 3 * 512, "distribute": 3 * 512, "recut": 0, "update": 0}
    assert run_ranks(bytes_of_two_steps, 4) == [sent] * 4


def two_meshes() -> list[Tensor]:
    """One step by the sizes of groups, and by a mesh of the user that has the same groups."""
    outputs = []
    user_mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    for options in ({"mesh": user_mesh}, {"mesh": user_mesh["dp", "ep"]}, {}):
        module = models.build(torch.float64)
        config = sml.SwiftMoEConfig(expert_parallel_size=2)
        engine = sml.SwiftMoEEngine(module, config, **options)
        optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
        train(engine, engine.data_parallel(), optimizer, range(2), torch.float64)
        outputs.append(engine.full_state_dict()["1.experts.down_proj"])
    return outputs


def test_a_mesh_of_the_user_is_taken() -> None:
    for outputs in run_ranks(two_meshes, 4):
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


def refuse(case: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    # A rank that has raised would no longer help the others to connect the mesh.
    dist.barrier()
    if case == "part":
        sml.SwiftMoEEngine(models.build(), mesh=mesh["ep"])
    elif case == "both":
        sml.SwiftMoEEngine(models.build(), sml.SwiftMoEConfig(expert_parallel_size=4), mesh=mesh)
    else:
        sml.SwiftMoEEngine(models.build(), sml.SwiftMoEConfig(expert_parallel_size=3))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("part", r"mesh must have .* all 4 ranks, got .*\(ep=2\)"),
        ("both", "expert_parallel_size=4, and the last axis of the mesh has 2 ranks"),
        ("size", "expert_parallel_size=3 does not divide the 4 ranks.* Set it to one of 1, 2, 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused_on_every_rank(case: str, message: str) -> None:
    for error in rank_errors(refuse, 4, case):
        assert re.search(message, error, re.DOTALL), error


def save_or_resume(size: int, folder: Path, steps: range) -> dict[str, Tensor]:
    """Train these steps, after a load if they are not the first, and save."""
    engine, model, optimizer = build(size, torch.float64)
    if steps.start:
        saved = torch.load(folder / f"{steps.start}.pt", weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        engine.load_state_dict(saved["swiftmoe"])
    train(engine, model, optimizer, steps, torch.float64)
    state = {
        "model": engine.full_state_dict(),
        "optimizer": checkpoint.full_state(optimizer.state_dict(), keep=True),
        "swiftmoe": engine.state_dict(),
    }
    if dist.get_rank() == 0:
        torch.save(state, folder / f"{steps.stop}.pt")
    return state["model"]


def test_a_run_resumes_with_other_groups_and_other_numbers_of_ranks(tmp_path: Path) -> None:
    expected = dense.train_dense(dict(models.build().state_dict()), torch.float64)
    run_ranks(save_or_resume, 4, 2, tmp_path, range(10))
    run_ranks(save_or_resume, 4, 4, tmp_path, range(10, 20))
    for state in run_ranks(save_or_resume, 3, 1, tmp_path, range(20, 30)):
        errors = {name: relative_error(state[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-12, errors


def evaluate_unevenly(num_batches: list[int]) -> list[Tensor]:
    """Forward of each rank's own batches, differently many, before any training forward."""
    rank = dist.get_rank()
    engine, model, _ = build(2, torch.float64)
    with torch.no_grad():
        outputs = [model.module(dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]) for i in range(num_batches[rank])]
    engine.join()
    return outputs


@pytest.mark.parametrize("num_batches", [[2, 0, 3, 1], [1, 2, 0, 0]])
def test_groups_may_have_different_numbers_of_evaluation_batches(num_batches: list[int]) -> None:
    weights = models.build(torch.float64).state_dict()
    for rank, outputs in enumerate(run_ranks(evaluate_unevenly, 4, num_batches)):
        assert len(outputs) == num_batches[rank]
        for i, output in enumerate(outputs):
            x = dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]
            torch.testing.assert_close(output, dense.dense_forward(weights, x), rtol=1e-12, atol=1e-14)


def stop_on(asking: int) -> list[bool]:
    engine, model, optimizer = build(2)
    stops = []
    for step in range(4):
        if step == 1 and dist.get_rank() == asking:
            engine.request_stop()
        train(engine, model, optimizer, range(step, step + 1), torch.float32)
        stops.append(engine.stops)
    return stops


@pytest.mark.parametrize("asking", [0, 3])
def test_a_stop_is_seen_by_all_groups_in_the_same_step(asking: int) -> None:
    assert run_ranks(stop_on, 4, asking) == [[False, False, True, True]] * 4


def poison_one_group() -> None:
    engine, model, optimizer = build(2)
    train(engine, model, optimizer, range(1), torch.float32)
    x = dense.batch(1, 0, torch.float32)[0][:6]
    if dist.get_rank() == 3:
        x[0] = float("nan")
    model(x).sum().backward()


def test_an_error_of_one_group_ends_all_ranks() -> None:
    first, second, third, fourth = rank_errors(poison_one_group, 4)
    for error in (third, fourth):
        assert "FloatingPointError" in error
        assert "on rank [3]" in error
    for error in (first, second):
        # They miss the ranks that have ended.
        assert "FloatingPointError" not in error


def move_biases(size: int) -> list[list[float]]:
    """The router's biases after three steps."""
    torch.manual_seed(0)
    router = sml.TopKRouter(8, 6, 2, bias_update_rate=0.125)
    module = sml.MoE(8, 8, 6, 2, router=router).double()
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(expert_parallel_size=size))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    biases = []
    for step in range(3):
        x = torch.randn(4, 20, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x[dist.get_rank()]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert router.expert_bias is not None
        biases.append(router.expert_bias.tolist())
    return biases


def test_router_biases_move_by_the_tokens_of_all_groups() -> None:
    expected = run_ranks(move_biases, 4, 4)[0]
    assert any(any(step) for step in expected)
    assert run_ranks(move_biases, 4, 2) == [expected] * 4
