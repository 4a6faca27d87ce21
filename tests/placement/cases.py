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
    """[W, E] assignments: small, with many zeros."""
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


def most_served(load_E, placement, budget):
    """How many assignments any split can serve under `placement` with a budget for each rank: a maximum flow, found
    by augmenting paths."""
    ranks_of = [[] for _ in load_E]
    for rank, expert in zip(placement.pair_rank_P.tolist(), placement.pair_expert_P.tolist(), strict=True):
        ranks_of[expert].append(rank)
    room = [budget] * placement.world_size
    flow = {}
    served = 0
    for expert, load in enumerate(load_E):
        left = int(load)
        while left:
            path = _augmenting_path(expert, ranks_of, flow, room)
            if path is None:
                break
            amount = min([left, room[path[-1][1]], *(flow[e, w] for (e, w), backwards in _moves(path) if backwards)])
            for (e, w), backwards in _moves(path):
                flow[e, w] = flow.get((e, w), 0) + (-amount if backwards else amount)
            room[path[-1][1]] -= amount
            left -= amount
            served += amount
    return served


def _augmenting_path(start, ranks_of, flow, room):
    """[(expert, rank)] steps from an expert to a rank with room: to a rank of its, back through an expert there, on."""
    seen, queue = {}, [(start, None, None)]
    for expert, via, before in queue:
        for rank in ranks_of[expert]:
            if rank in seen:
                continue
            seen[rank] = (expert, via, before)
            step = [(expert, rank)]
            if room[rank] > 0:
                while before is not None:
                    expert_before, rank_before = before
                    step.insert(0, (expert_before, rank_before))
                    before = seen[rank_before][2]
                return step
            queue += [(e, rank, (expert, rank)) for (e, w), f in flow.items() if w == rank and f > 0]
    return None


def _moves(path):
    """Pairs that gain or lose flow along a path: each rank gains from its expert, and gives up the next one's."""
    for i, (expert, rank) in enumerate(path):
        yield (expert, rank), False
        if i + 1 < len(path):
            yield (path[i + 1][0], rank), True
