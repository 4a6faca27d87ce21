import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning import Placement
from tests.placement.cases import placements


def test_pairs_and_replicas_of_a_small_table():
    placement = Placement([0, 0, 2, 1, 0, 2], num_experts=3, world_size=2)
    assert placement.slots_per_rank == 3
    assert placement.replica_counts_E.tolist() == [3, 1, 2]
    assert placement.pair_rank_P.tolist() == [0, 0, 1, 1, 1]
    assert placement.pair_expert_P.tolist() == [0, 2, 0, 1, 2]
    assert placement.pair_slots_P.tolist() == [2, 1, 1, 1, 1]
    assert placement.num_pairs_W.tolist() == [2, 3]
    assert [placement.experts_of(rank).tolist() for rank in (0, 1)] == [[0, 2], [0, 1, 2]]
    assert [placement.pairs_of(*ranks) for ranks in ((0, 1), (1, 1), (1, 4), (2, 2))] == [
        slice(0, 2),
        slice(2, 2),
        slice(2, 5),
        slice(5, 5),
    ]


def test_only_replicas_on_a_new_rank_count_as_moved():
    before = Placement([0, 1, 2, 0], 3, 2)
    assert before.num_moved(before) == 0
    assert before.num_moved(Placement([1, 0, 0, 2], 3, 2)) == 0
    assert before.arrivals(Placement([0, 0, 1, 2], 3, 2)).tolist() == [False, True, False]
    assert before.num_moved(Placement([0, 0, 1, 2], 3, 2)) == 1
    assert before.num_moved(Placement([2, 2, 0, 1], 3, 2)) == 2


def test_placements_with_equal_tables_are_equal_and_hash_alike():
    a, b = Placement([0, 1, 1, 0], 2, 2), Placement(np.array([0, 1, 1, 0], dtype=np.int32), 2, 2)
    assert a == b
    assert hash(a) == hash(b)
    assert a != Placement([0, 1, 0, 1], 2, 2)
    assert a != Placement([0, 1, 1, 0], 2, 1)
    assert a != "table"


def test_a_placement_does_not_follow_later_changes_of_the_array_it_was_made_from():
    table = np.array([0, 1, 1, 0])
    placement = Placement(table, 2, 2)
    table[:] = 0
    assert placement.slot_to_expert_S.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("table", "num_experts", "world_size", "message"),
    [
        ([0, 1, 2], 3, 2, r"world_size x slots_per_rank entries, got shape \(3,\) for 2 ranks"),
        ([], 1, 1, r"got shape \(0,\) for 1 ranks"),
        ([[0, 1]], 2, 1, r"one row of .* got shape \(1, 2\)"),
        ([0, 3], 3, 2, r"holds experts 0\.\.3, but there are 3: use ids 0\.\.2"),
        ([-1, 0], 1, 2, r"holds experts -1\.\.0, but there are 1"),
        ([0, 2, 0, 2], 4, 2, r"experts \[1, 3\] have no slot. Every expert needs at least one replica"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, num_experts, world_size, message):
    with pytest.raises(ValueError, match=message):
        Placement(table, num_experts, world_size)


@given(placements())
@settings(max_examples=60, deadline=None)
def test_pairs_are_the_distinct_experts_of_each_rank(placement):
    table_Ws = placement.slot_to_expert_S.reshape(placement.world_size, -1)
    expected = [(rank, e) for rank, row in enumerate(table_Ws.tolist()) for e in sorted(set(row))]
    assert list(zip(placement.pair_rank_P, placement.pair_expert_P, strict=True)) == expected
    assert placement.pair_slots_P.tolist() == [table_Ws[rank].tolist().count(e) for rank, e in expected]
    assert placement.replica_counts_E.sum() == placement.pair_slots_P.sum() == placement.slot_to_expert_S.size
    assert placement.num_pairs_W.sum() == len(expected)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_moved_replicas_are_the_difference_of_the_sets_of_pairs(data):
    before = data.draw(placements(max_world_size=4))
    later = data.draw(placements(world_size=before.world_size, num_experts=before.num_experts))
    pairs = [set(zip(p.pair_rank_P.tolist(), p.pair_expert_P.tolist(), strict=True)) for p in (before, later)]
    assert before.num_moved(later) == len(pairs[1] - pairs[0])


def test_an_experts_first_pair_is_its_first_rank() -> None:
    placement = Placement(np.array([0, 1, 1, 0, 2, 1]), num_experts=3, world_size=3)
    assert list(zip(placement.pair_rank_P.tolist(), placement.pair_expert_P.tolist(), strict=True)) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (2, 1),
        (2, 2),
    ]
    assert placement.is_first_pair_P.tolist() == [True, True, False, False, False, True]
