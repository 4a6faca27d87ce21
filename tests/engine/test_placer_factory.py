from __future__ import annotations

import gc
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning import Placement, PlacementPolicy, SwiftMoEConfig
from swiftmoe_lightning.engine.placer_factory import make_placer
from swiftmoe_lightning.placement import ExpertLoad, Forecast, plan_dispatch

E, W = 4, 4


class Coldest(PlacementPolicy):
    """All spare replicas for the expert that got least."""

    has_uniform_fallback = True

    def place(self, forecast: Forecast) -> list[Placement]:
        popularity_LE = forecast.popularity_LE
        tables = [
            np.r_[np.arange(E), np.full(self.num_slots - E, popularity_E.argmin())] for popularity_E in popularity_LE
        ]
        return self.placements_of(tables, E)


class ColdestAtFirst(Coldest):
    """For its first placements; then for the expert that got most."""

    num_calls = 0

    def place(self, forecast: Forecast) -> list[Placement]:
        self.num_calls += 1
        return super().place(
            forecast if self.num_calls <= 8 else replace(forecast, popularity_LE=-forecast.popularity_LE)
        )


def train(policy: Any, rank: int, num_steps: int) -> None:
    """Steps of two layers with one hot expert; the placer is dropped in the end, as with an engine."""
    group = SimpleNamespace(is_first=rank == 0, expert=SimpleNamespace(size=W), ranks_per_node=W)
    placer = make_placer(SwiftMoEConfig(placement=policy, slots_per_rank=2), group)  # type: ignore[arg-type]
    counts_1E = np.array([[100, 90, 80, 1]])
    placements = placer.planned({"a.experts": E, "b.experts": E})
    for _ in range(num_steps):
        plans = {name: plan_dispatch(counts_1E, placement) for name, placement in placements.items()}
        loads = {name: ExpertLoad.of(counts_1E, plan, placements[name]) for name, plan in plans.items()}
        placements = placer.next_placements(loads)
    del placer
    gc.collect()


def test_a_run_in_which_uniform_replicas_replaced_most_plans_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="swiftmoe_lightning")
    train(Coldest, rank=0, num_steps=10)
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "uniform replicas stood in for most placements by it in 2 layer(s), most in a.experts, " in warned[0]
    assert " of 10 times" in warned[0]
    # Each switch, too, for those who ask for more.
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO", "WARNING"]


def test_a_run_in_which_they_replaced_a_few_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="swiftmoe_lightning")
    train(ColdestAtFirst, rank=0, num_steps=60)
    # Each layer's way there and back.
    assert [record.levelname for record in caplog.records] == ["INFO"] * 4


@pytest.mark.parametrize(("policy", "rank"), [("balanced", 0), (Coldest, 1)])
def test_nothing_is_logged_without_fallbacks_or_by_other_ranks(
    policy: Any, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="swiftmoe_lightning")
    train(policy, rank, num_steps=10)
    assert not caplog.records
