"""The paper's way: its plans by literals, and on real ranks the same gradients and weights as plain sums and copies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.step.paper_way import (
    Message,
    PaperLayer,
    RegisteredGroups,
    hosts_of,
    plan_fetches,
    plan_weights,
    run_both_phases,
)
from swiftmoe_lightning.analysis.cost import Machine, paper_bytes
from swiftmoe_lightning.placement import Placement
from tests.helpers import run_ranks

# Expert 0 in three slots of two ranks, expert 1 in one, expert 2 in two of one rank.
PLACEMENT = Placement(np.array([0, 0, 0, 1, 2, 2]), 3, 3)
SHAPES = ((6, 2), (3, 4))


def test_owners_fetch_from_themselves_or_from_ranks_in_turn() -> None:
    assert hosts_of(PLACEMENT) == [[0, 1], [1], [2]]
    fetches = plan_fetches(PLACEMENT)
    assert [(m.expert, m.source, m.owner) for m in fetches] == [
        (0, 0, 0),
        (0, 1, 1),
        (0, 0, 2),
        (1, 1, 0),
        (1, 1, 1),
        (1, 1, 2),
        (2, 2, 0),
        (2, 2, 1),
        (2, 2, 2),
    ]
    assert all(m.destination == m.owner for m in fetches)


def test_weights_go_to_every_slot() -> None:
    messages = plan_weights(PLACEMENT)
    assert len(messages) == 6 * 3
    assert messages[3:6] == [Message(0, owner, 0, owner, 1) for owner in range(3)]
    assert messages[-1] == Message(2, 2, 2, 2, 1)


def _both_phases() -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
    rank, groups = dist.get_rank(), RegisteredGroups()
    layers = [PaperLayer(PLACEMENT, SHAPES, groups) for _ in range(2)]
    for number, layer in enumerate(layers):
        for gradient, shards in zip(layer.gradients, layer.shards, strict=True):
            gradient.copy_(torch.randn(gradient.shape, generator=torch.Generator().manual_seed(10 * number + rank)))
            shards.copy_(_shard(_weights(shards.shape[2], number), rank))
    run_both_phases(layers)
    return layers[1].shard_gradients, layers[1].slots, layers[1].bytes_sent


def _weights(width: int, number: int) -> torch.Tensor:
    """[E, rows, width] of one tensor."""
    rows = next(shape[0] for shape in SHAPES if shape[1] == width)
    return torch.arange(3.0 * rows * width).view(3, rows, width) + number


def _shard(whole: torch.Tensor, rank: int) -> torch.Tensor:
    return whole.chunk(3, dim=1)[rank]


def test_gradients_are_the_ranks_mean_and_slots_have_the_weights() -> None:
    results = run_ranks(_both_phases, 3)
    for tensor, shape in enumerate(SHAPES):
        mean = torch.zeros(3, *shape)
        for rank in range(3):
            # As `_both_phases` draws: ranks have 1, 2 and 1 experts.
            experts = PLACEMENT.experts_of(rank)
            draws = torch.randn(len(experts), *shape, generator=torch.Generator().manual_seed(10 + rank))
            mean[experts] += draws / 3
        for rank, (gradients, slots, _) in enumerate(results):
            torch.testing.assert_close(gradients[tensor], _shard(mean, rank))
            expected = _weights(shape[1], 1)[PLACEMENT.table_Ws[rank]]
            assert torch.equal(slots[tensor], expected)


def test_bytes_are_those_of_the_formula() -> None:
    expert_bytes = 4 * sum(int(np.prod(shape)) for shape in SHAPES)
    machine = Machine(num_ranks=3, slots_per_rank=2, expert_bytes=expert_bytes)
    counted = sum(sent for _, _, sent in run_ranks(_both_phases, 3))
    assert counted == paper_bytes(PLACEMENT.num_pairs, 3, machine)


def _scattered() -> None:
    groups = RegisteredGroups()
    with pytest.raises(ValueError, match=r"ranks \[0, 2\] are not consecutive"):
        groups.of([0, 2])


def test_an_expert_on_ranks_apart_has_no_group() -> None:
    run_ranks(_scattered, 3)
