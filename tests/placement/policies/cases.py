"""Popularity to place, and a policy's placement of it as a table."""

import numpy as np
from hypothesis import strategies as st

from swiftmoe_lightning.placement import Forecast, make_policy


def table_of(name, popularity, world_size, slots_per_rank):
    policy = make_policy(name, world_size, slots_per_rank)
    (placement,) = policy.place(Forecast.of(np.array([popularity]), spread=0.0))
    return placement.slot_to_expert_S.reshape(world_size, slots_per_rank).tolist()


@st.composite
def cases(draw):
    world_size, num_experts = draw(st.integers(1, 7)), draw(st.integers(1, 12))
    least = -(-num_experts // world_size)
    slots_per_rank = draw(st.integers(least, least + 3))
    loads = st.one_of(st.just(0), st.integers(0, 50), st.integers(0, 10**7))
    num_layers = draw(st.integers(1, 3))
    row = st.lists(loads, min_size=num_experts, max_size=num_experts)
    return draw(st.lists(row, min_size=num_layers, max_size=num_layers)), world_size, slots_per_rank
