"""Traces to write and to read."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

# Two steps, two ranks, one layer, three experts; the second step routed nothing.
COUNTS = np.array([[[[4, 0, 2]], [[1, 0, 5]]], [[[0, 0, 0]], [[0, 0, 0]]]])
METADATA = {"format_version": 1, "layers": ["moe.experts"], "world_size": 2, "slots_per_rank": 2}


def recording() -> dict[str, np.ndarray]:
    """What a recorder hands to a writer, with COUNTS."""
    return {
        "counts": COUNTS.copy(),
        "replicas": np.array([[[1, 1, 2]], [[2, 1, 1]]]),
        "loads": np.array([[[6, 5]], [[0, 0]]]),
        "dropped": np.array([[1], [0]]),
        "moved": np.array([[0], [2]]),
        "step": np.array([3, 4]),
    }


@st.composite
def recordings(draw: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays with counts and steps, and metadata."""
    shape = draw(st_numpy.array_shapes(min_dims=4, max_dims=4, max_side=4))
    # Few values, so that whole steps, ranks, layers and experts are empty now and then.
    values = st.one_of(st.just(0), st.integers(0, 2**40))
    counts = draw(st_numpy.arrays(np.int64, shape, elements=values).filter(lambda counts: counts.any()))
    steps = draw(st.sets(st.integers(0, 2**40), min_size=shape[0], max_size=shape[0]))
    layers = draw(st.lists(st.text(max_size=5), min_size=shape[2], max_size=shape[2]))
    return {"counts": counts, "step": np.array(sorted(steps))}, {**METADATA, "layers": layers}
