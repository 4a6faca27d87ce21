"""Evaluation with sharded experts between steps of training: equal to one process, and training goes on exactly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import nightly, only_by_day, rank_errors, run_ranks

STEPS = 6


def build(**options: Any) -> tuple[sml.SwiftMoEEngine, Any, Any]:
    """The model of `dense.dense_forward`, evaluated with sharded experts, placed at random."""
    settings = {"placement": models.RandomPolicy, "slots_per_rank": 4, "evaluate": "sharded", **options}
    per_node, frozen = settings.pop("ranks_per_node", None), settings.pop("frozen", "")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp")) if settings.pop("tensor_parallel", 0) else None
    module, config = models.build(torch.float64), sml.SwiftMoEConfig(**settings)
    engine = sml.SwiftMoEEngine(module, config, ranks_per_node=per_node, tensor_mesh=mesh)
    for name, parameter in engine.module.named_parameters():
        if frozen and name.endswith(frozen):
            parameter.requires_grad_(False)
    model = engine.data_parallel()
    return engine, model, engine.prepare_optimizer(torch.optim.AdamW(engine.module.parameters(), lr=1e-2))


def evaluate(engine: sml.SwiftMoEEngine, step: int) -> None:
    """Twice, this rank's own tokens, differently many and none on one rank; the second time nothing is cut."""
    rank, training = dist.get_rank(), engine.module.training
    x = dense.batch(rank, step, torch.float64)[0][: 3 * rank]
    engine.module.eval()
    with torch.no_grad():
        outputs = [engine.module(x)]
    sent = engine.traffic
    assert all(layer.slots.is_cut for layer in engine.layers)
    with torch.inference_mode():
        outputs.append(engine.module(x))
    assert engine.traffic == sent
    engine.module.train(training)
    weights = engine.full_state_dict()
    for output in outputs:
        torch.testing.assert_close(output, dense.dense_forward(weights, x), rtol=1e-12, atol=1e-14)


def train(evaluates: Callable[[int], None] | None, options: dict[str, Any]) -> dict[str, Tensor]:
    """Some steps of training, with evaluations in all places if `evaluates`; without, whole experts are never cut."""
    engine, model, optimizer = build(**options)
    rank, size = dist.get_rank(), dist.get_world_size()

    def pause(*steps: int) -> None:
        if evaluates and step in steps:
            evaluate(engine, step)

    for step in range(STEPS):
        for micro_batch in range(dense.MICRO_BATCHES):
            last = micro_batch == dense.MICRO_BATCHES - 1
            x, target = (models.my_part(t, rank, size) for t in dense.batch(step, micro_batch, torch.float64))
            with nullcontext() if last else model.no_sync():
                loss = F.mse_loss(model(x), target) / dense.MICRO_BATCHES
                pause(2)
                loss.backward()
            if not last:
                pause(1, 4)
        pause(3, 4)
        optimizer.step()
        optimizer.zero_grad()
        pause(0, 3, 5)
        if evaluates and step == 3:
            engine.module.load_state_dict(engine.full_state_dict())
            evaluate(engine, step)
        if evaluates and step == 4:
            engine.mark_stale()
            evaluate(engine, step)
            # In eval mode, but with gradients: the ordinary way.
            engine.module.eval()
            assert engine.module(x).requires_grad
            engine.module.train()
            assert not any(layer.slots.is_cut for layer in engine.layers)
    loads = {
        f"{name} {key}": s[key] for name, s in engine.state_dict().items() for key in ("popularity", "slot_to_expert")
    }
    return {**engine.full_state_dict(), **loads}


def compare_training(cases: list[dict[str, Any]]) -> None:
    for options in cases:
        expected, actual = (train(evaluates, options) for evaluates in (None, evaluate))
        different = [name for name in expected if not torch.equal(actual[name], expected[name])]
        assert not different, (options, different)


CASES: dict[str, list[dict[str, Any]]] = {
    "together": [
        {"expert_parallel_size": 2, "dense": "fsdp2", "offload_optimizer": True},
        {"frozen": "down_proj", "exchange": "two_level", "ranks_per_node": 2},
    ],
    "plain": [{}],
    "groups": [{"expert_parallel_size": 2}],
    "cut dense part": [{"dense": "fsdp2"}],
    "offloaded": [{"offload_optimizer": True}],
    "frozen": [{"frozen": "down_proj"}],
    "two levels": [{"exchange": "two_level", "ranks_per_node": 2}],
}


@pytest.mark.parametrize("cases", only_by_day(CASES, "together"))
def test_training_goes_on_as_if_nothing_had_been_evaluated(cases: list[dict[str, Any]]) -> None:
    run_ranks(compare_training, 4, cases)


def evaluate_unevenly(num_batches: list[int], options: dict[str, Any]) -> list[Tensor]:
    """Forward of each rank's own batches, differently many, before any training forward."""
    engine, model, _ = build(**options)
    rank = dist.get_rank() // (1 if engine.group.tensor is None else 2)
    model.eval()
    with torch.no_grad():
        outputs = [engine.module(inputs(rank, i)) for i in range(num_batches[rank])]
    # How a rank serves does not hang on its own mode.
    model.train(rank == 1)
    engine.join()
    ranks = [r if engine.group.tensor is None else r // 2 for r in engine.group.expert.ranks]
    assert all(layer.slots.is_cut == any(num_batches[r] for r in ranks) for layer in engine.layers)
    return outputs


def inputs(rank: int, i: int) -> Tensor:
    return dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]


@pytest.mark.parametrize(
    ("num_batches", "options"),
    [
        ([1, 2, 0, 0], {"expert_parallel_size": 2}),
        # Ranks 0 and 1 have the same tokens, 2 and 3 have.
        *nightly(
            ([2, 1, 3, 0], {}),
            ([1, 2], {"tensor_parallel": True, "dense": "fsdp2"}),
            ([2, 0, 3, 1], {"exchange": "two_level", "ranks_per_node": 2}),
        ),
    ],
)
def test_ranks_may_have_any_numbers_of_batches(num_batches: list[int], options: dict[str, Any]) -> None:
    weights = models.build(torch.float64).state_dict()
    for rank, outputs in enumerate(run_ranks(evaluate_unevenly, 4, num_batches, options)):
        data_rank = rank * len(num_batches) // 4
        assert len(outputs) == num_batches[data_rank]
        for i, output in enumerate(outputs):
            expected = dense.dense_forward(weights, inputs(data_rank, i))
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-14)


def evaluate_in_two_modes() -> None:
    engine, model, _ = build()
    model.train(dist.get_rank() == 1)
    with torch.no_grad():
        engine.module(inputs(0, 0))


def test_ranks_of_different_modes_are_an_error_on_all() -> None:
    for error in rank_errors(evaluate_in_two_modes, 2):
        assert (
            "ranks are in different forward passes: rank 0 evaluates layer '1.experts' in torch.float64 with sharded "
            "experts; rank 1 evaluates layer '1.experts' in torch.float64; every rank must run the same MoE layers"
        ) in error
