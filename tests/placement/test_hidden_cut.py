"""Which part of the hidden dim each rank has, and from whom it gets its pieces: literal examples."""

from __future__ import annotations

import numpy as np
import pytest

from swiftmoe_lightning.placement import HiddenLayout, Placement, hidden_slices, piece_senders


@pytest.mark.parametrize(
    ("length", "layout", "world_size", "expected"),
    [
        (8, "single", 2, [[slice(0, 4)], [slice(4, 8)]]),
        # 7 hidden units on 3 ranks: 2, 2 and 3.
        (7, "single", 3, [[slice(0, 2)], [slice(2, 4)], [slice(4, 7)]]),
        # Gates 0..2, then ups 3..5: a rank has the ups of its gates.
        (6, "halves", 2, [[slice(0, 1), slice(3, 4)], [slice(1, 3), slice(4, 6)]]),
        # Gates are even rows, ups odd ones.
        (6, "pairs", 2, [[slice(0, 2)], [slice(2, 6)]]),
        # Fewer hidden units than ranks.
        (1, "single", 2, [[slice(0, 0)], [slice(0, 1)]]),
    ],
)
def test_slices(length: int, layout: HiddenLayout, world_size: int, expected: list[list[slice]]) -> None:
    assert [list(hidden_slices(length, layout, world_size, rank)) for rank in range(world_size)] == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_every_unit_is_on_one_rank_and_no_rank_has_two_more_than_another(world_size: int) -> None:
    parts = [hidden_slices(37, "single", world_size, rank)[0] for rank in range(world_size)]
    assert [unit for part in parts for unit in range(37)[part]] == list(range(37))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_takes_its_piece_from_itself_or_in_turn_from_those_that_have_the_expert() -> None:
    # Rank 0 has experts 0 and 1, rank 1 has 1 and 2, rank 2 has 3 and 1, rank 3 has 0 alone, twice.
    placement = Placement(np.array([0, 1, 1, 2, 3, 1, 0, 0]), num_experts=4, world_size=4)
    assert piece_senders(placement).tolist() == [
        [0, 0, 1, 2],
        [3, 1, 1, 2],
        [0, 2, 1, 2],
        [3, 1, 1, 2],
    ]
