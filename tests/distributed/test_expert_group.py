"""Which neighbours of an expert group share a node."""

from __future__ import annotations

import pytest

from swiftmoe_lightning.distributed.expert_group import ranks_on_a_node


@pytest.mark.parametrize(
    ("ranks", "node_size", "expected"),
    [
        (range(8), 4, 4),
        (range(4), 8, 4),
        # The last node has two of the six.
        (range(6), 4, 4),
        # The second group of six begins in the middle of a node.
        (range(6, 12), 4, 2),
        # One rank of each of four nodes, and two of each of two.
        ((0, 4, 8, 12), 4, 1),
        ((0, 2, 4, 6), 4, 2),
        ((1, 5, 6, 9), 4, 1),
    ],
)
def test_literal_neighbours(ranks, node_size, expected) -> None:
    assert ranks_on_a_node(ranks, node_size) == expected
