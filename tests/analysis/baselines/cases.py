"""Hypothesis strategies for runs of a few steps."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st


@st.composite
def histories(draw):
    """([N, L, E] int64 popularity of N steps, W, s): any counts, also of no token at all or of one expert's."""
    world_size, num_experts = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    least = -(-num_experts // world_size)
    slots_per_rank = draw(st.integers(least, least + 3))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 3)), num_experts
    loads = st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 10**7))
    size = int(np.prod(shape))
    popularity = np.array(draw(st.lists(loads, min_size=size, max_size=size)), dtype=np.int64)
    return popularity.reshape(shape), world_size, slots_per_rank
