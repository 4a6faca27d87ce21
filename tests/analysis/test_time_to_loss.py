"""Savings to a loss, by literals."""

from __future__ import annotations

import math

import pytest

from swiftmoe_lightning.analysis.time_to_loss import position_of, saved, target_loss

STEPS, LOSSES = [0, 10, 20, 30, 40], [5.0, 4.0, 4.5, 3.0, 3.2]


@pytest.mark.parametrize(
    ("loss", "step"),
    [(6.0, 0.0), (5.0, 0.0), (4.5, 5.0), (4.0, 10.0), (3.5, 25.0), (3.0, 30.0), (2.9, math.inf)],
)
def test_a_loss_is_reached_where_the_least_one_so_far_crosses_it(loss: float, step: float) -> None:
    assert position_of(loss, STEPS, LOSSES) == step


@pytest.mark.parametrize(("share", "loss"), [(0.0, 5.0), (0.25, 4.0), (0.5, 4.0), (0.75, 3.0), (1.0, 3.0)])
def test_the_target_is_the_least_loss_up_to_a_share_of_the_run(share: float, loss: float) -> None:
    assert target_loss(share, STEPS, LOSSES) == loss


def test_what_is_saved() -> None:
    assert saved(30.0, 40.0) == 0.25
    assert saved(50.0, 40.0) == -0.25
    assert saved(math.inf, 40.0) == -math.inf
