"""The weight exchanges as messages."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import (
    Messages,
    Placement,
    ShardBlock,
    SlotBlock,
    plan_distribution,
    plan_messages,
    shard_rows,
)
from tests.placement.cases import placements


def test_literal_messages() -> None:
    # Rank 0 has experts 0 and 1, rank 1 has 1 in both slots. The second tensor's one row is rank 0's.
    placement = Placement(np.array([0, 1, 1, 1]), num_experts=2, world_size=2)
    assert plan_messages(placement, (4, 1), 0) == Messages(
        in_slots=[SlotBlock(1, 0, 0, slice(2, 4)), SlotBlock(1, 1, 0, slice(2, 4))],
        in_shards=[ShardBlock(1, 2, 1, 0), ShardBlock(1, 2, 1, 1)],
    )
    assert plan_messages(placement, (4, 1), 1) == Messages(
        in_slots=[SlotBlock(0, 0, 0, slice(0, 2)), SlotBlock(0, 0, 1, slice(0, 1))],
        in_shards=[ShardBlock(0, 0, 0, 0), ShardBlock(0, 1, 1, 0)],
    )


def test_messages_of_some_pairs() -> None:
    # Of rank 0's experts 0 and 1 and rank 1's 1, the first stays where it is.
    placement, arrives_P = Placement(np.array([0, 1, 1, 1]), num_experts=2, world_size=2), np.array([False, True, True])
    assert plan_messages(placement, (4, 1), 0, arrives_P) == Messages(
        in_slots=[SlotBlock(1, 1, 0, slice(2, 4))], in_shards=[ShardBlock(1, 2, 1, 0), ShardBlock(1, 2, 1, 1)]
    )
    assert plan_messages(placement, (4, 1), 1, arrives_P).in_shards == [ShardBlock(0, 1, 1, 0)]
    assert plan_messages(placement, (4, 1), 1, ~arrives_P) == Messages([], [ShardBlock(0, 0, 0, 0)])


def test_peers_come_by_their_distance() -> None:
    messages = plan_messages(Placement(np.arange(4), num_experts=4, world_size=4), (4,), 1)
    assert [block.peer for block in messages.in_slots] == [0, 3, 2]
    assert [block.peer for block in messages.in_shards] == [2, 3, 0]


@given(placements(), st.lists(st.integers(1, 9), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_two_ranks_list_their_blocks_alike_and_send_what_the_plan_says(placement, num_rows) -> None:
    world_size = placement.world_size
    all_messages = [plan_messages(placement, num_rows, rank) for rank in range(world_size)]
    for rank, messages in enumerate(all_messages):
        for peer in range(world_size):
            received = [b for b in messages.in_slots if b.peer == peer]
            sent = [b for b in all_messages[peer].in_shards if b.peer == rank]
            assert [(placement.experts_of(rank)[b.index], b.tensor) for b in received] == [
                (b.expert, b.tensor) for b in sent
            ]
            for block in received:
                assert (block.rows.start, block.rows.stop) == shard_rows(num_rows[block.tensor], world_size)[peer]
            assert all(placement.pair_expert_P[b.pair] == b.expert for b in sent)
            assert all(placement.pair_rank_P[b.pair] == rank for b in sent)
        plan = plan_distribution(placement, [(rows, 1) for rows in num_rows])
        num_elements = sum(b.rows.stop - b.rows.start for b in messages.in_slots)
        assert num_elements == sum(plan.receive_splits(rank)) - plan.receive_splits(rank)[rank]
