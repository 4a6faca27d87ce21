import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import Placement
from swiftmoe_lightning.placement import PeerBlock, plan_buffer, plan_collection, plan_distribution, shard_rows
from swiftmoe_lightning.placement.transfer import shard_elements
from tests.placement.cases import placements


def test_rows_are_cut_in_equal_parts_with_the_last_ones_shorter():
    assert shard_rows(8, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert shard_rows(7, 3) == [(0, 3), (3, 6), (6, 7)]
    assert shard_rows(5, 4) == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert shard_rows(1, 3) == [(0, 1), (1, 1), (1, 1)]


@given(st.integers(1, 200), st.integers(1, 70))
@settings(max_examples=80, deadline=None)
def test_rows_are_cut_where_torch_chunk_cuts(num_rows, world_size):
    chunks = [c.tolist() for c in torch.arange(num_rows).chunk(world_size)]
    chunks += [[]] * (world_size - len(chunks))
    assert [list(range(first, last)) for first, last in shard_rows(num_rows, world_size)] == chunks


def test_neighbours_that_own_equally_many_rows_form_a_block() -> None:
    def peers(rows_of_tensors: list[int]) -> list[range]:
        return [block.peers for block in plan_buffer(tuple((rows, 1) for rows in rows_of_tensors), 4, 1)]

    assert peers([8, 4]) == [range(0, 4)]
    # 7 rows: 2, 2, 2, 1. 5 rows: 2, 2, 1, 0.
    assert peers([7]) == [range(0, 3), range(3, 4)]
    assert peers([7, 5]) == [range(0, 2), range(2, 3), range(3, 4)]
    assert peers([2]) == [range(0, 2), range(2, 4)]


# Rank 0 has experts 0 and 1, rank 1 has 1 in both its slots.
PLACEMENT = Placement([0, 1, 1, 1], 2, 2)
# A matrix of 3 rows of 10 elements and a bias of 2: rank 0 owns 2 * 10 + 1 of them, rank 1 owns 10 + 1.
ROW_ELEMENTS = ((3, 10), (2, 1))


def elements_WW(plan, world_size=2):
    """All sources' rows, checked against the receivers' columns."""
    table_WW = np.array([plan.send_splits(rank) for rank in range(world_size)])
    assert [plan.receive_splits(rank) for rank in range(world_size)] == table_WW.T.tolist()
    return table_WW


def test_collection_sends_the_rows_of_every_gradient_to_their_owners():
    assert shard_elements(ROW_ELEMENTS, 2).tolist() == [21, 11]
    plan = plan_collection(PLACEMENT, ROW_ELEMENTS)
    assert elements_WW(plan).tolist() == [[42, 22], [21, 11]]
    assert [plan.elements_sent(rank) for rank in (0, 1)] == [22, 21]


def test_distribution_is_the_collection_turned_round():
    plan = plan_distribution(PLACEMENT, ROW_ELEMENTS)
    assert elements_WW(plan).tolist() == [[42, 21], [22, 11]]


def test_a_distribution_of_some_pairs_sends_their_rows_alone():
    plan = plan_distribution(PLACEMENT, ROW_ELEMENTS, np.array([True, False, False]))
    assert elements_WW(plan).tolist() == [[21, 0], [11, 0]]


@pytest.mark.parametrize("plan_of", [plan_collection, plan_distribution])
@given(placement=placements(), rows=st.integers(1, 4), elements=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_bytes_on_the_wire_are_what_the_design_says_when_ranks_divide_the_rows(plan_of, placement, rows, elements):
    world_size = placement.world_size
    expert_elements = rows * world_size * elements
    plan = plan_of(placement, [(rows * world_size, elements)])
    num_pairs = placement.num_pairs
    on_the_wire = sum(plan.elements_sent(rank) for rank in range(world_size))
    assert on_the_wire * world_size == expert_elements * (num_pairs * world_size - num_pairs)


@given(placements(), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_every_rank_receives_its_rows_of_every_pair_and_whole_experts_of_its_own(placement, row_elements):
    owned_W = shard_elements(tuple(row_elements), placement.world_size)
    whole = sum(rows * elements for rows, elements in row_elements)
    assert owned_W.sum() == whole
    collection, distribution = plan_collection(placement, row_elements), plan_distribution(placement, row_elements)
    num_pairs = placement.num_pairs
    for rank in range(placement.world_size):
        assert sum(collection.receive_splits(rank)) == num_pairs * owned_W[rank]
        assert sum(distribution.receive_splits(rank)) == placement.num_pairs_W[rank] * whole
    collected_WW, distributed_WW = (elements_WW(plan, placement.world_size) for plan in (collection, distribution))
    assert np.array_equal(collected_WW, distributed_WW.T)


def test_a_buffer_is_one_block_where_the_ranks_divide_all_rows():
    # Two tensors of 4 rows of 3 and 2 rows of 5 elements: every peer owns 2 * 3 + 1 * 5 elements of each expert.
    assert plan_buffer(((4, 3), (2, 5)), 2, 6) == (PeerBlock(range(0, 2), 0, (range(0, 4), range(0, 2)), (6, 5)),)


def test_a_buffer_of_uneven_rows_has_a_block_for_each_size_of_shard():
    # The picture of `plan_buffer`: A of 3 rows of 2 elements, B of 2 rows of 1; two experts.
    assert plan_buffer(((3, 2), (2, 1)), 2, 2) == (
        PeerBlock(range(0, 1), 0, (range(0, 2), range(0, 1)), (4, 1)),
        PeerBlock(range(1, 2), 10, (range(2, 3), range(1, 2)), (2, 1)),
    )
    # 7 rows on 4 ranks: 2, 2, 2, 1. Three peers of 2 * 10 elements for each of 3 experts come first.
    assert plan_buffer(((7, 10),), 4, 3) == (
        PeerBlock(range(0, 3), 0, (range(0, 6),), (20,)),
        PeerBlock(range(3, 4), 180, (range(6, 7),), (10,)),
    )


def test_peers_without_rows_have_a_block_of_nothing():
    # One row on 3 ranks; and a tensor of 2 rows, of which the second peer owns one.
    assert plan_buffer(((1, 4),), 3, 2) == (
        PeerBlock(range(0, 1), 0, (range(0, 1),), (4,)),
        PeerBlock(range(1, 3), 8, (range(1, 1),), (0,)),
    )
    assert plan_buffer(((1, 4), (2, 3)), 3, 2) == (
        PeerBlock(range(0, 1), 0, (range(0, 1), range(0, 1)), (4, 3)),
        PeerBlock(range(1, 2), 14, (range(1, 1), range(1, 2)), (0, 3)),
        PeerBlock(range(2, 3), 20, (range(1, 1), range(2, 2)), (0, 0)),
    )


def test_a_rank_without_experts_has_an_empty_buffer():
    assert plan_buffer(((7, 10),), 4, 0) == (
        PeerBlock(range(0, 3), 0, (range(0, 6),), (20,)),
        PeerBlock(range(3, 4), 0, (range(6, 7),), (10,)),
    )


@given(placements(), st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_blocks_fill_the_buffer_and_peers_find_their_rows_of_it(placement, row_elements):
    world_size = placement.world_size
    for rank in range(world_size):
        splits = plan_collection(placement, row_elements).send_splits(rank)
        num_experts = int(placement.num_pairs_W[rank])
        blocks = plan_buffer(tuple(row_elements), world_size, num_experts)
        assert [peer for block in blocks for peer in block.peers] == list(range(world_size))
        for block in blocks:
            assert block.offset == sum(splits[: block.peers.start])
            for index, peer in enumerate(block.peers):
                assert splits[peer] == num_experts * sum(block.widths)
                for (num_rows, elements), rows, width in zip(row_elements, block.rows, block.widths, strict=True):
                    size = len(rows) // len(block.peers)
                    first = rows.start + index * size
                    assert (first, first + size) == shard_rows(num_rows, world_size)[peer]
                    assert width == size * elements
