"""Who keeps whose copy, and who fetches what, with literals."""

from __future__ import annotations

import pytest

from swiftmoe_lightning.placement import copy_ranks, plan_fetches


@pytest.mark.parametrize(
    ("node_W", "copies"),
    [
        ([0, 0, 1, 1], [2, 3, 0, 1]),
        ([0, 0, 1, 1, 2, 2], [2, 3, 4, 5, 0, 1]),
        # Nodes of 1 and 3 ranks: rank 0 keeps all three.
        ([0, 1, 1, 1], [1, 0, 0, 0]),
        # Ranks of a node need not be neighbours.
        ([0, 1, 0, 1], [1, 0, 3, 2]),
        ([0, 0, 0], [None, None, None]),
    ],
)
def test_a_copy_is_on_the_next_node(node_W: list[int], copies: list[int | None]) -> None:
    assert copy_ranks(node_W) == copies


def test_a_node_fetches_what_it_lacks_from_the_next_one_that_has_it() -> None:
    # Three nodes of one rank each; each has its own file and the previous one's; the third node is new.
    assert plan_fetches(["0", "1", "2"], [{"0", "2"}, {"1", "0"}, set()]) == [
        ("0", 0, 2),
        ("1", 1, 0),
        ("1", 1, 2),
        ("2", 0, 1),
        ("2", 0, 2),
    ]


def test_a_file_that_no_node_has_cannot_be_fetched() -> None:
    assert plan_fetches(["0", "1"], [{"0"}, {"0"}]) is None
    assert plan_fetches(["0", "1"], [{"0", "1"}, {"0", "1"}]) == []
