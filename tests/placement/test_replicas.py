"""Rows of a part, cut over the ranks of several groups that have it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from swiftmoe_lightning.placement import num_elements, replica_slices, shard_rows


def test_literal_slices() -> None:
    rows = ((6, 2), (2, 1))
    assert replica_slices(rows, 2, 0, 2) == ((slice(0, 4), slice(6, 7)), (slice(4, 6), slice(7, 7)))
    assert replica_slices(rows, 2, 1, 1) == ((slice(0, 6), slice(6, 7)),)
    # Three ranks for two rows: the last has none.
    assert replica_slices(((4, 3),), 2, 1, 3) == ((slice(0, 3),), (slice(3, 6),), (slice(6, 6),))
    assert num_elements((slice(0, 4), slice(6, 7))) == 5


@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 6),
)
def test_every_element_of_a_part_has_one_owner(rows, num_parts, num_replicas) -> None:
    for part in range(num_parts):
        slices = replica_slices(tuple(rows), num_parts, part, num_replicas)
        owned = sorted(i for own in slices for s in own for i in range(s.start, s.stop))
        sizes = [(last - first) * width for n, width in rows for first, last in [shard_rows(n, num_parts)[part]]]
        assert owned == list(range(sum(sizes)))
