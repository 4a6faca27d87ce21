"""Whole matrices dealt to ranks, and the rows of an expert's two matrices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swiftmoe_lightning.placement import LAYOUTS, MatrixBlock, MatrixStack, part_of_rows, plan_matrices


def test_literal_blocks() -> None:
    # Three matrices with 2 * 2 * 2 of work and two with half of it: the middle of the second is where the half ends.
    stacks = (MatrixStack(3, 2, 2), MatrixStack(2, 1, 4))
    assert [stack.work for stack in stacks] == [8, 4]
    assert plan_matrices(stacks, 2, 100) == (
        (MatrixBlock(0, 0, 2, 0), MatrixBlock(0, 2, 3, 1), MatrixBlock(1, 0, 2, 1)),
    )
    # One expert's gate and up, on more ranks than matrices.
    assert plan_matrices((MatrixStack(1, 4, 4), MatrixStack(1, 4, 4)), 4, 100) == (
        (MatrixBlock(0, 0, 1, 1), MatrixBlock(1, 0, 1, 3)),
    )
    assert plan_matrices((), 2, 100) == ()


def test_literal_buckets() -> None:
    # A rank may hold 3 elements, or the largest matrix, of 4: a bucket of two ranks has 8.
    assert plan_matrices((MatrixStack(3, 2, 2),), 2, 3) == (
        (MatrixBlock(0, 0, 1, 0), MatrixBlock(0, 1, 2, 1)),
        (MatrixBlock(0, 2, 3, 1),),
    )


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 60),
)
def test_every_matrix_has_one_rank_and_work_and_memory_are_bounded(
    shapes: list[tuple[int, int, int]], num_ranks: int, most_elements: int
) -> None:
    stacks = tuple(MatrixStack(*shape) for shape in shapes)
    plan = plan_matrices(stacks, num_ranks, most_elements)
    dealt = [(b.stack, matrix) for bucket in plan for b in bucket for matrix in range(b.first, b.stop)]
    assert dealt == [(index, matrix) for index, stack in enumerate(stacks) for matrix in range(stack.num_matrices)]
    for bucket in plan:
        ranks = [block.rank for block in bucket]
        assert ranks == sorted(ranks)
        assert sum(b.num_matrices * stacks[b.stack].elements for b in bucket) <= num_ranks * max(
            most_elements, *(stack.elements for stack in stacks)
        )
        work_W = np.bincount(ranks, [b.num_matrices * stacks[b.stack].work for b in bucket], num_ranks)
        assert work_W.max() <= work_W.mean() + max(stacks[block.stack].work for block in bucket)


def test_literal_rows() -> None:
    # Rows 2 to 6 of 8: of halves 2 and 3, then 4 to 6; of rows in turn 2, 4, 6, then 3, 5.
    assert part_of_rows(2, 7, 8, "matrix", 0) == (slice(0, 5), range(2, 7))
    assert part_of_rows(2, 7, 8, "halves", 0) == (slice(0, 2), range(2, 4))
    assert part_of_rows(2, 7, 8, "halves", 1) == (slice(2, 5), range(3))
    assert part_of_rows(2, 7, 8, "interleaved", 0) == (slice(0, 5, 2), range(1, 4))
    assert part_of_rows(2, 7, 8, "interleaved", 1) == (slice(1, 5, 2), range(1, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(st.integers(1, 8), st.integers(0, 16), st.integers(0, 16))
def test_the_rows_at_hand_are_those_of_the_matrix(layout: str, half: int, first: int, last: int) -> None:
    num_rows = 2 * half
    first, last = sorted((min(first, num_rows), min(last, num_rows)))
    rows = np.arange(num_rows)
    parts = {"matrix": [rows], "halves": [rows[:half], rows[half:]], "interleaved": [rows[0::2], rows[1::2]]}[layout]
    for part, whole in enumerate(parts):
        where, rows_of_part = part_of_rows(first, last, num_rows, layout, part)
        assert np.arange(first, last)[where].tolist() == whole[rows_of_part.start : rows_of_part.stop].tolist()
        assert len(rows_of_part) == np.isin(whole, np.arange(first, last)).sum()
