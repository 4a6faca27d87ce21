"""Messages from place to place give bit for bit what the packed all-to-all gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from swiftmoe_lightning.distributed import RankGroup
from swiftmoe_lightning.engine.direct_exchange import DirectCollection, DirectDistribution, travels_directly
from swiftmoe_lightning.engine.packed_exchange import PackedCollection, PackedDistribution
from swiftmoe_lightning.placement import Placement, arriving_indices, shard_rows
from tests.helpers import run_ranks

# Rows that no number of ranks divides, one row for all ranks, and a bias.
SHAPES = {"up": (7, 3), "one": (1, 4), "bias": (5,)}
NUM_EXPERTS = 5


def exchange_both_ways(table: list[int]) -> list[list[dict[str, Tensor]]]:
    """[distribute, distribute of every other pair, collect] of [direct, packed] results."""
    assert dist.group.WORLD is not None
    ranks = RankGroup(dist.group.WORLD)
    placement = Placement(np.array(table), NUM_EXPERTS, ranks.size)
    generator = torch.Generator().manual_seed(ranks.rank)
    rows = {name: shard_rows(shape[0], ranks.size)[ranks.rank] for name, shape in SHAPES.items()}
    shards = {
        name: torch.randn(NUM_EXPERTS, last - first, *SHAPES[name][1:], generator=generator)
        for name, (first, last) in rows.items()
    }
    gradients = {
        name: torch.randn(placement.slots_per_rank, *shape, generator=generator) for name, shape in SHAPES.items()
    }
    sent: list[int] = []

    def distribute(arrives_P: np.ndarray | None) -> list[dict[str, Tensor]]:
        distributed = []
        for distribution in (DirectDistribution, PackedDistribution):
            slots = {name: torch.zeros(placement.slots_per_rank, *shape) for name, shape in SHAPES.items()}
            under_way = distribution(shards, slots, placement, ranks, arrives_P)
            under_way.finish()
            distributed.append(slots)
            sent.append(under_way.bytes_sent)
        return distributed

    whole = distribute(None)
    arrives_P = np.arange(placement.num_pairs) % 3 != 1
    some = distribute(arrives_P)
    arriving = arriving_indices(placement, ranks.rank, arrives_P)
    for name, tensor in some[0].items():
        expected = torch.zeros_like(tensor)
        expected[arriving] = whole[0][name][arriving]
        assert torch.equal(tensor, expected), name
    collected = []
    for collection in (
        DirectCollection(gradients, placement, ranks),
        PackedCollection(gradients, placement, ranks, torch.float32),
    ):
        collected.append(collection.finish())
        sent.append(collection.bytes_sent)
    assert sent[::2] == sent[1::2]
    assert sent[2] < sent[0]
    return [whole, some, collected]


@pytest.mark.parametrize(
    "table",
    [
        [0, 1, 2, 3, 4, 0],
        [4, 4, 4, 0, 1, 2, 3, 4, 3],
        [0, 1, 2, 3, 4, 3, 2, 1, 0, 0, 4, 4],
        [0, 1, 2, 3, 4] * 4,
    ],
)
def test_direct_equals_packed(table: list[int]) -> None:
    world_size = {6: 2, 9: 3, 12: 4, 20: 4}[len(table)]
    for results in run_ranks(exchange_both_ways, world_size, table):
        for direct, packed in results:
            for name in SHAPES:
                assert torch.equal(direct[name], packed[name]), name


def test_only_large_blocks_on_the_cpu_travel_directly() -> None:
    large = {"up": torch.empty(1, 1024, 1024), "bias": torch.empty(1, 64)}
    assert travels_directly(large, 4)
    assert not travels_directly(large, 8)
    assert not travels_directly({name: tensor.to("meta") for name, tensor in large.items()}, 1)
