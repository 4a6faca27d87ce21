"""Hypothesis strategies for placements and counts, and slow plain-loop versions of what the package vectorises."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from swiftmoe_lightning import Placement


@st.composite
def placements(draw, world_size=None, num_experts=None, max_world_size=6, max_experts=7):
    """Any valid placement: every expert somewhere, the rest of the slots filled at random."""
    world_size = world_size or draw(st.integers(1, max_world_size))
    num_experts = num_experts or draw(st.integers(1, max_experts))
    least = -(-num_experts // world_size)
    num_slots = world_size * draw(st.integers(least, least + 3))
    extra = draw(
        st.lists(st.integers(0, num_experts - 1), min_size=num_slots - num_experts, max_size=num_slots - num_experts)
    )
    return Placement(draw(st.permutations([*range(num_experts), *extra])), num_experts, world_size)


@st.composite
def counts_of(draw, placement, max_count=40):
    """[W, E] token-choices: small, with many zeros."""
    values = st.lists(
        st.one_of(st.just(0), st.integers(0, max_count)),
        min_size=placement.world_size * placement.num_experts,
        max_size=placement.world_size * placement.num_experts,
    )
    return np.array(draw(values), dtype=np.int64).reshape(placement.world_size, placement.num_experts)


def algorithm_1(popularity, num_slots):
    """The paper's Algorithm 1, word by word, one layer, in plain Python."""
    goal = [p / sum(popularity) * num_slots for p in popularity]
    counts = [int(max(g, 1)) for g in goal]
    diff = [c - g for c, g in zip(counts, goal, strict=True)]
    while sum(counts) > num_slots:
        i = diff.index(max(diff))
        if counts[i] > 1:
            counts[i] -= 1
        diff[i] -= 1
    while sum(counts) < num_slots:
        i = diff.index(min(diff))
        counts[i] += 1
        diff[i] += 1
    return counts
