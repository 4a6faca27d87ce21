"""Which rank works on which whole matrices, where every rank has rows of all of them. W ranks.

An optimizer such as Muon needs an expert's gate, up and down whole, and rows of each lie on every rank. For a moment
each matrix is put together on one rank, so that all have about equal work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Final

# How the matrices of an expert lie in its tensor: one; one half after the other; every second row.
LAYOUTS: Final = ("matrix", "halves", "interleaved")


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of one shape, as the gates of a layer's experts.

    Attributes:
        num_matrices: how many.
        rows: of each.
        columns: of each.
    """

    num_matrices: int
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        """Of one matrix."""
        return self.rows * self.columns

    @property
    def work(self) -> int:
        """Multiplications of a product of one matrix with its transpose, up to a factor."""
        return self.elements * min(self.rows, self.columns)


@dataclass(frozen=True)
class MatrixBlock:
    """Consecutive matrices of a stack that one rank puts together.

    Attributes:
        stack: its index.
        first: of the matrices.
        stop: the last one plus one.
        rank: that gets their rows.
    """

    stack: int
    first: int
    stop: int
    rank: int

    @property
    def num_matrices(self) -> int:
        """How many."""
        return self.stop - self.first


@lru_cache(maxsize=64)
def plan_matrices(
    stacks: tuple[MatrixStack, ...], world_size: int, most_elements: int
) -> tuple[tuple[MatrixBlock, ...], ...]:
    """Deal all matrices to the ranks, in buckets that fit into memory.

    Within a bucket the matrices keep their order, and consecutive ones go to the same rank: of equal ones, no rank gets
    more than one over its share. Three experts' matrices of one shape, then two of another with half the work, on two
    ranks:

        matrix      a0   a1   a2   b0  b1
        work         2    2    2    1   1
        rank         0    0    1    1   1

    Args:
        stacks: in the same order on all ranks.
        world_size: W.
        most_elements: of a bucket, as a rank's share of it. A bucket may have as many of the largest matrix as there
            are ranks, so a rank holds that matrix at least.

    Returns:
        For each bucket its blocks, by rank, then in the order of the stacks.
    """
    largest = max((stack.elements for stack in stacks), default=0)
    capacity = world_size * max(most_elements, largest)
    buckets: list[list[tuple[int, int]]] = [[]]
    elements = 0
    for index, stack in enumerate(stacks):
        for matrix in range(stack.num_matrices):
            if elements + stack.elements > capacity:
                buckets.append([])
                elements = 0
            buckets[-1].append((index, matrix))
            elements += stack.elements
    return tuple(_deal(stacks, bucket, world_size) for bucket in buckets if bucket)


def _deal(stacks: Sequence[MatrixStack], bucket: Sequence[tuple[int, int]], world_size: int) -> tuple[MatrixBlock, ...]:
    """Each matrix goes to the rank in whose share of the work its middle lies."""
    total = sum(stacks[index].work for index, _ in bucket)
    before, owned = 0, []
    for index, matrix in bucket:
        work = stacks[index].work
        owned.append((index, matrix, world_size * (2 * before + work) // (2 * total)))
        before += work
    blocks = []
    for (index, rank), members in groupby(owned, key=lambda entry: (entry[0], entry[2])):
        matrices = [matrix for _, matrix, _ in members]
        blocks.append(MatrixBlock(index, matrices[0], matrices[-1] + 1, rank))
    return tuple(blocks)


def part_of_rows(first: int, last: int, num_rows: int, layout: str, part: int) -> tuple[slice, range]:
    """Which of the rows `first` to `last` - 1 of an expert's tensor belong to one of its matrices.

    Args:
        first: of the rows at hand.
        last: one after the last of them.
        num_rows: of the tensor; or its columns, with `first` 0 and `last` the same number.
        layout: one of `LAYOUTS`.
        part: 0, or 1 for the second matrix of two.

    Returns:
        Where they lie among the rows at hand, and which rows of the matrix they are.
    """
    if layout == "matrix":
        return slice(0, last - first), range(first, last)
    if layout == "interleaved":
        start, stop = ((edge - part + 1) // 2 for edge in (first, last))
        return slice(2 * start + part - first, last - first, 2), range(start, stop)
    half = num_rows // 2
    start, stop = (min(max(edge - part * half, 0), half) for edge in (first, last))
    offset = part * half - first if start < stop else -start
    return slice(start + offset, stop + offset), range(start, stop)
