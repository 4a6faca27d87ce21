from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning import Placement, PlacementPolicy, SwiftMoEConfig
from swiftmoe_lightning.engine.placing import Placers
from swiftmoe_lightning.placement import Observation, plan_dispatch

E, W = 4, 4


class Coldest(PlacementPolicy):
    """All spare replicas for the expert that got least."""

    is_guarded = True

    def next_placements(self, popularity_LE: np.ndarray) -> list[Placement]:
        tables = [
            np.r_[np.arange(E), np.full(self.num_slots - E, popularity_E.argmin())] for popularity_E in popularity_LE
        ]
        return self.placements_of(tables, E)


def train(policy: Any, rank: int, num_steps: int) -> None:
    """Steps of two layers with one hot expert; the placers are dropped in the end, as with an engine."""
    group = SimpleNamespace(rank=rank, world_size=W, ranks_per_node=W)
    placers = Placers(SwiftMoEConfig(placement=policy, slots_per_rank=2), group)  # type: ignore[arg-type]
    placer = placers.of(E)
    popularity_E = np.array([100, 90, 80, 1])
    names = ["a.experts", "b.experts"]
    placements = dict(zip(names, placer.placements_of(names), strict=True))
    for _ in range(num_steps):
        wanted = {name: plan_dispatch(popularity_E[None], p).wanted_W for name, p in placements.items()}
        placements = placer.next_placements({n: Observation(placements[n], popularity_E, wanted[n]) for n in names})
    del placers
    gc.collect()


def test_a_run_with_an_overruled_policy_ends_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="swiftmoe_lightning")
    train(Coldest, rank=0, num_steps=10)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "uniform replicas stood in for placements by it in 2 layer(s), most in a.experts, " in warned[0]
    assert " of 10 times" in warned[0]
    # Each switch, too, for those who ask for more.
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]


@pytest.mark.parametrize(("policy", "rank"), [("balanced", 0), (Coldest, 1)])
def test_nothing_is_said_without_a_reason_or_by_other_ranks(
    policy: Any, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="swiftmoe_lightning")
    train(policy, rank, num_steps=10)
    assert not caplog.records
