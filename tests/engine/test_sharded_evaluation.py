"""Evaluation with a part of every expert on each rank: equal to whole experts on one process, in every way to get there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.engine.test_expert_groups import train
from tests.helpers import nightly, rank_errors, run_ranks


def build(**options: Any) -> tuple[sml.SwiftMoEEngine, Any, Any]:
    """Random placements of the model of `dense.dense_forward`, evaluated with sharded experts unless told otherwise."""
    settings = {"placement": models.RandomPolicy, "slots_per_rank": 4, "evaluate": "sharded", **options}
    engine = sml.SwiftMoEEngine(models.build(torch.float64), sml.SwiftMoEConfig(**settings))
    model = engine.data_parallel()
    return engine, model, engine.prepare_optimizer(torch.optim.AdamW(engine.module.parameters(), lr=1e-2))


def inputs(rank: int, i: int) -> Tensor:
    return dense.batch(rank, i, torch.float64)[0][: 1 + 7 * i]


def evaluate_unevenly(num_batches: list[int], options: dict[str, Any]) -> list[Tensor]:
    rank = dist.get_rank()
    engine, model, _ = build(**options)
    model.eval()
    with torch.no_grad():
        outputs = [engine.module(inputs(rank, i)) for i in range(num_batches[rank])]
        engine.join()
    group = engine.group.expert.ranks
    assert all(layer.slots.is_cut == any(num_batches[r] for r in group) for layer in engine.layers)
    return outputs

CASES = [([2, 0], {}), ([2, 0, 3, 1], {}), ([1,2,0,0], {"expert_parallel_size": 2})]

@pytest.mark.parametrize(("num_batches", "options"), CASES)
def test_uneven(num_batches: list[int], options: dict[str, Any]) -> None:
    weights = models.build(torch.float64).state_dict()
    for rank, outputs in enumerate(run_ranks(evaluate_unevenly, len(num_batches), num_batches, options)):
        for i, output in enumerate(outputs):
            torch.testing.assert_close(output, dense.dense_forward(weights, inputs(rank, i)), rtol=1e-12, atol=1e-14)
