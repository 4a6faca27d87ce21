"""FlexMoE on real ranks: as many bytes as the state of what has moved."""

from __future__ import annotations

import numpy as np
from torch import nn

from benchmarks.common.flexmoe import flexmoe_policy, move_state
from swiftmoe_lightning import Experts, Placement
from swiftmoe_lightning.placement import Forecast
from tests.helpers import run_ranks


def test_placements_are_revised_at_the_interval() -> None:
    policy = flexmoe_policy(3)(2, 2)
    forecast = Forecast.of(np.array([[8.0, 1.0, 1.0]]))
    tables = [policy.place(forecast)[0].slot_to_expert_S.tolist() for _ in range(4)]
    assert tables[0] == tables[1]
    assert len({tuple(table) for table in tables}) == 2


def _move() -> list[int]:
    experts = Experts(2, 4, 4)
    model = nn.ModuleDict({"experts": experts})
    before, after = ({"experts": Placement(np.array(table), 2, 2)} for table in ([0, 1], [1, 0]))
    return [move_state(model, before, before), move_state(model, before, after)]


def test_the_state_of_experts_that_moved_is_sent() -> None:
    elements = 2 * 4 * 4 + 4 * 4
    for stayed, moved in run_ranks(_move, 2):
        assert stayed == 0
        # Two experts with two copies of 4 bytes each, of which each rank sends half of its half.
        assert moved == 2 * 2 * 4 * elements // 4
