"""What the two weight phases send, and when they wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import swiftmoe_lightning as sml
from swiftmoe_lightning.placement import plan_collection, plan_distribution
from tests.engine import models
from tests.helpers import run_ranks


def count_bytes(config: dict[str, Any], dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes this rank has sent in three steps, and what the plans of their placements say."""
    rank = dist.get_rank()
    module = models.build(dtype)
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(**config))
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    shapes = {
        layer.experts: [(p.shape[1], p[0, 0].numel()) for p in layer.experts.parameters()] for layer in engine.layers
    }
    wire, slot = getattr(torch, config.get("reduce_dtype", "float32")).itemsize, dtype.itemsize
    expected = {"collect": 0, "reduce": 0, "gather": 0, "distribute": 0, "recut": 0, "update": 0}
    for layer in engine.layers:
        # The first forward fetches the slots.
        expected["distribute"] += plan_distribution(layer.placement, shapes[layer.experts]).elements_sent(rank) * slot
    for step in range(3):
        for layer in engine.layers:
            expected["collect"] += plan_collection(layer.placement, shapes[layer.experts]).elements_sent(rank) * wire
        x, target = (models.my_part(t, rank, dist.get_world_size()) for t in models.dense.batch(step, 0, dtype))
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in engine.layers:
            plan = plan_distribution(layer.placement, shapes[layer.experts])
            expected["distribute"] += plan.elements_sent(rank) * slot
    engine.wait_for_weights()
    return dict(engine.traffic), expected


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"placement": "packed"}, torch.float32),
        ({"placement": "symi", "slots_per_rank": 5, "reduce_dtype": "bfloat16"}, torch.float32),
        ({"placement": models.RandomPolicy, "slots_per_rank": 4}, torch.bfloat16),
    ],
)
def test_bytes_sent_are_the_plans(world_size: int, config: dict[str, Any], dtype: torch.dtype) -> None:
    for actual, expected in run_ranks(count_bytes, world_size, config, dtype):
        assert actual == expected
        assert actual["collect"] > 0
        assert actual["distribute"] > 0


def step_every(replace_every: int) -> list[list[int]]:
    """The first layer's placement after each of six steps."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    module = models.build()
    config = sml.SwiftMoEConfig(slots_per_rank=4, placement=models.RandomPolicy, replace_every=replace_every)
    engine = sml.SwiftMoEEngine(module, config)
    model = engine.data_parallel()
    optimizer = engine.prepare_optimizer(torch.optim.SGD(module.parameters(), lr=0.1))
    tables = []
    for step in range(6):
        x, target = (models.my_part(t, rank, world_size) for t in models.dense.batch(step, 0, torch.float32))
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        tables.append(engine.placements["1.experts"].slot_to_expert_S.tolist())
    return tables


def test_replace_every_places_every_nth_step() -> None:
    tables = run_ranks(step_every, 2, 3)[0]
    changes = [i for i in range(1, 6) if tables[i] != tables[i - 1]]
    assert changes == [2, 5]
