"""Weights and gradients at two levels: literal plans, and both exchanges carried out on arrays."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.placement import (
    Placement,
    RailBlock,
    plan_collection,
    plan_node_transfer,
    plan_rail_buffer,
    shard_rows,
)
from swiftmoe_lightning.placement.transfer import shard_elements

# 2 nodes of 2 ranks: expert 0 on ranks 0, 1 and 3, expert 1 on rank 1, expert 2 on ranks 2 and 3.
PLACEMENT = Placement([0, 0, 0, 1, 2, 2, 2, 0], 3, 4)
# 4 rows of 10 elements and 3 rows of 1: ranks 0, 1 and 2 own 11 elements of an expert, rank 3 owns 10.
ROW_ELEMENTS = ((4, 10), (3, 1))


def test_literal_plans():
    plan = plan_node_transfer(PLACEMENT, ROW_ELEMENTS, rank=1, ranks_per_node=2)
    # Node 0 has experts 0 and 1, node 1 has 0 and 2.
    assert plan.nodes.pair_expert_P.tolist() == [0, 1, 0, 2]
    assert plan.inside.table_Ws.tolist() == [[0, 0], [0, 1]]
    # Rail 0 owns 22 elements of an expert, rail 1 21. Rank 0 has one expert, rank 1 two.
    assert [plan.collect_inside.send_splits(number) for number in (0, 1)] == [[22, 21], [44, 42]]
    # Rank 1 owns 11, rank 3 owns 10; each node has two experts.
    assert [plan.collect_between.send_splits(node) for node in (0, 1)] == [[22, 20], [22, 20]]
    assert plan.distribute_between.receive_splits(0) == plan.collect_between.send_splits(0)
    assert plan.distribute_inside.send_splits(1) == plan.collect_inside.receive_splits(1) == [21, 42]


def test_experts_of_a_node_are_numbered_among_themselves():
    plan = plan_node_transfer(PLACEMENT, ROW_ELEMENTS, rank=3, ranks_per_node=2)
    assert plan.nodes.experts_of(1).tolist() == [0, 2]
    assert plan.inside.table_Ws.tolist() == [[1, 1], [1, 0]]


def test_a_buffer_by_rail_is_one_block_where_the_ranks_divide_all_rows():
    assert plan_rail_buffer(((8, 3), (4, 1)), 4, 2, 5) == (
        RailBlock(range(2), range(2), 0, (range(8), range(4)), (6, 1)),
    )


def test_a_buffer_by_rail_of_uneven_rows_has_a_block_a_peer():
    # Peers 0, 2, 1, 3: three rows of 5 elements for 2 experts, of which peer 3 owns none.
    blocks = plan_rail_buffer(((3, 5),), 4, 2, 2)
    assert [(b.numbers.start, b.nodes.start, b.offset, b.rows, b.widths) for b in blocks] == [
        (0, 0, 0, (range(0, 1),), (5,)),
        (0, 1, 10, (range(2, 3),), (5,)),
        (1, 0, 20, (range(1, 2),), (5,)),
        (1, 1, 30, (range(3, 3),), (0,)),
    ]


def pack(tensors, row_elements, world_size, size):
    """Whole tensors [d, rows, elements] -> the flat buffer by rail."""
    num_experts, buffer = len(tensors[0]), []
    for block in plan_rail_buffer(row_elements, world_size, size, num_experts):
        shape = (len(block.nodes), len(block.numbers), -1)
        # [numbers, nodes, d, elements of a peer] for each tensor.
        parts = [
            tensor[:, rows.start : rows.stop].reshape(num_experts, *shape).transpose(2, 1, 0, 3)
            for tensor, rows in zip(tensors, block.rows, strict=True)
        ]
        assert [part.shape[-1] for part in parts] == list(block.widths)
        assert sum(map(len, buffer)) == block.offset
        buffer.append(np.concatenate(parts, axis=-1).reshape(-1))
    return np.concatenate(buffer)


def owned(tensors, row_elements, world_size, rank):
    """Whole tensors [d, rows, elements] -> [d, elements that `rank` owns]."""
    starts = [shard_rows(rows, world_size)[rank] for rows, _ in row_elements]
    return np.concatenate([t[:, a:b].reshape(len(t), -1) for t, (a, b) in zip(tensors, starts, strict=True)], axis=1)


def all_to_all(send, splits):
    """[i][j] pieces: what rank j sends to rank i. splits: of each rank."""
    pieces = [np.split(buffer, np.cumsum(split)[:-1]) for buffer, split in zip(send, splits, strict=True)]
    return [[piece[to] for piece in pieces] for to in range(len(send))]


@st.composite
def clusters(draw):
    num_nodes, size = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (2, 3), (3, 2)]))
    num_ranks, num_experts, slots = num_nodes * size, draw(st.integers(1, 5)), draw(st.integers(2, 3))
    slots = max(slots, -(-num_experts // num_ranks))
    spare = st.lists(
        st.integers(0, num_experts - 1),
        min_size=num_ranks * slots - num_experts,
        max_size=num_ranks * slots - num_experts,
    )
    table = draw(spare.flatmap(lambda more: st.permutations([*range(num_experts), *more])))
    tensors = st.lists(st.tuples(st.integers(1, 13), st.integers(1, 3)), min_size=1, max_size=2)
    row_elements = draw(st.one_of(tensors, st.just([(num_ranks * 2, 3), (num_ranks, 1)])))
    return Placement(table, num_experts, num_ranks), tuple(row_elements), size


@given(clusters(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_owners_get_the_sum_over_all_replicas(case, seed):
    placement, row_elements, size = case
    num_ranks, rng = placement.world_size, np.random.default_rng(seed)
    gradients = [
        [rng.integers(0, 100, (count, *shape)) for shape in row_elements] for count in placement.num_pairs_W.tolist()
    ]
    plans = [plan_node_transfer(placement, row_elements, rank, size) for rank in range(num_ranks)]
    owned_W = shard_elements(row_elements, num_ranks)
    sums = {}
    for first in range(0, num_ranks, size):
        node = range(first, first + size)
        send = [pack(gradients[rank], row_elements, num_ranks, size) for rank in node]
        splits = [plans[rank].collect_inside.send_splits(rank - first) for rank in node]
        for rank, pieces in zip(node, all_to_all(send, splits), strict=True):
            sums[rank] = sum_over_node(pieces, plans[rank].inside, owned_W[rank % size :: size])
    for number in range(size):
        rail = range(number, num_ranks, size)
        splits = [plans[rank].collect_between.send_splits(node) for node, rank in enumerate(rail)]
        for owner, pieces in zip(rail, all_to_all([sums[rank] for rank in rail], splits), strict=True):
            actual, expected = np.zeros((2, placement.num_experts, owned_W[owner]), dtype=np.int64)
            for node, piece in enumerate(pieces):
                experts = plans[owner].nodes.experts_of(node)
                actual[experts] += piece.reshape(len(experts), owned_W[owner])
            for rank in range(num_ranks):
                expected[placement.experts_of(rank)] += owned(gradients[rank], row_elements, num_ranks, owner)
            assert np.array_equal(actual, expected)


def sum_over_node(pieces, inside, owned_G):
    """From each rank of a node [G, d, elements of an owner], flat -> their sums [G, X, elements], flat."""
    totals = [np.zeros((inside.num_experts, width), dtype=np.int64) for width in owned_G]
    for mate, piece in enumerate(pieces):
        experts = inside.experts_of(mate)
        parts = np.split(piece, np.cumsum(owned_G * len(experts))[:-1])
        for total, part in zip(totals, parts, strict=True):
            total[experts] += part.reshape(len(experts), -1) if part.size else 0
    return np.concatenate([total.reshape(-1) for total in totals])


@given(clusters(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_ranks_get_their_experts_whole(case, seed):
    placement, row_elements, size = case
    num_ranks, rng = placement.world_size, np.random.default_rng(seed)
    weights = [rng.integers(0, 100, (placement.num_experts, *shape)) for shape in row_elements]
    plans = [plan_node_transfer(placement, row_elements, rank, size) for rank in range(num_ranks)]
    owned_W = shard_elements(row_elements, num_ranks)
    relayed = {}
    for number in range(size):
        rail = range(number, num_ranks, size)
        # Each owner: its rows of the experts of node 0, of node 1, ...
        send = [
            owned(weights, row_elements, num_ranks, rank)[plans[rank].nodes.pair_expert_P].reshape(-1) for rank in rail
        ]
        splits = [plans[rank].distribute_between.send_splits(node) for node, rank in enumerate(rail)]
        for rank, pieces in zip(rail, all_to_all(send, splits), strict=True):
            relayed[rank] = [
                piece.reshape(plans[rank].inside.num_experts, width)
                for piece, width in zip(pieces, owned_W[number::size], strict=True)
            ]
    for first in range(0, num_ranks, size):
        node = range(first, first + size)
        # Each relay: for each rank of its node, by owner, the rows of that rank's experts.
        send = [
            np.concatenate(
                [part[plans[rank].inside.experts_of(mate)].ravel() for mate in range(size) for part in parts]
            )
            for rank, parts in ((rank, relayed[rank]) for rank in node)
        ]
        splits = [plans[rank].distribute_inside.send_splits(rank - first) for rank in node]
        for rank, pieces in zip(node, all_to_all(send, splits), strict=True):
            experts = placement.experts_of(rank)
            whole = pack([tensor[experts] for tensor in weights], row_elements, num_ranks, size)
            assert np.concatenate(pieces).tolist() == whole.tolist()


@given(clusters())
@settings(max_examples=100, deadline=None)
def test_no_more_leaves_a_node_than_at_one_level_and_distribution_is_collection_backwards(case):
    placement, row_elements, size = case
    num_ranks = placement.world_size
    flat, two_level = 0, 0
    for rank in range(num_ranks):
        plan, (node, number) = plan_node_transfer(placement, row_elements, rank, size), divmod(rank, size)
        one_level = plan_collection(placement, row_elements).send_splits(rank)
        flat += sum(one_level) - sum(one_level[node * size : (node + 1) * size])
        two_level += plan.collect_between.elements_sent(node)
        assert plan.distribute_between.send_splits(node) == plan.collect_between.receive_splits(node)
        assert plan.distribute_inside.receive_splits(number) == plan.collect_inside.send_splits(number)
        # What a rank gets inside its node it sends on, but for the replicas that were summed.
        replicas = plan.inside.num_pairs
        received, sent = sum(plan.collect_inside.receive_splits(number)), sum(plan.collect_between.send_splits(node))
        assert received * plan.inside.num_experts == sent * replicas
    assert two_level <= flat
