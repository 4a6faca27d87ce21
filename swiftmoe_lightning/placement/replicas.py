"""Which elements of its rows each rank owns, where ranks of several expert groups share the rows of one shard.

The rows of every expert's tensor are cut over the g ranks of a group (`shard_rows`); each part is cut again over the R
ranks that have it, one of each group. R expert groups, c elements of one expert in a part, over all its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from swiftmoe_lightning.placement.transfer import shard_rows


@lru_cache(maxsize=1024)
def replica_slices(
    row_elements: tuple[tuple[int, int], ...], num_parts: int, part: int, num_replicas: int
) -> tuple[tuple[slice, ...], ...]:
    """For each of the R ranks that have a part: its own elements among the c of the part.

    A part is the rows of each tensor, one tensor after the other. Part 0 of 2, of two tensors, A of 6 rows of 2
    elements and B of 2 rows of 1, over 2 replicas:

        element    0   1   2   3   4   5   6
        row       A0  A0  A1  A1  A2  A2  B0
        replica    0   0   0   0   1   1   0        replica 0: 0:4 and 6:7, replica 1: 4:6 and 7:7

    Args:
        row_elements: for each tensor of an expert, its rows and the elements of one row.
        num_parts: g.
        part: index of the rank in its group.
        num_replicas: R.

    Returns:
        [R] of one slice for each tensor; they may be empty.
    """
    slices: list[list[slice]] = [[] for _ in range(num_replicas)]
    offset = 0
    for num_rows, width in row_elements:
        first, last = shard_rows(num_rows, num_parts)[part]
        for own, (start, stop) in zip(slices, shard_rows(last - first, num_replicas), strict=True):
            own.append(slice(offset + start * width, offset + stop * width))
        offset += (last - first) * width
    return tuple(map(tuple, slices))


def num_elements(slices: Sequence[slice]) -> int:
    """Elements in these slices."""
    return sum(part.stop - part.start for part in slices)
