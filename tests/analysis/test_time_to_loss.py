"""Savings to a loss, by literals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from swiftmoe_lightning.analysis.time_to_loss import Curve, describe, position_of, saved, target_loss

STATIC = Curve("static", [0, 10, 20], [0.0, 1.0, 2.0], [5.0, 4.0, 3.0], 0.6)
ADAPTIVE = Curve("swiftmoe", [0, 10, 20], [0.0, 1.5, 3.0], [5.0, 3.0, 2.0], 0.01)
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


@pytest.mark.parametrize(
    ("adaptive", "sentence"),
    [
        (
            ADAPTIVE,
            "swiftmoe reached static's best loss, 3.000, in 50% fewer steps and 25% less time: it "
            "dropped 1.0% of the tokens' expert assignments instead of 60.0%.",
        ),
        (
            replace(ADAPTIVE, steps=[0, 40, 50], seconds=[0.0, 3.0, 4.0]),
            "swiftmoe reached static's best loss, 3.000, in 100% more steps and 50% more time: it "
            "dropped 1.0% of the tokens' expert assignments instead of 60.0%.",
        ),
        (
            replace(ADAPTIVE, losses=[5.0, 4.0, 3.5]),
            "swiftmoe dropped 1.0% of the tokens' expert assignments instead of 60.0%, and did not reach static's "
            "best loss, 3.000.",
        ),
    ],
)
def test_one_sentence_says_what_is_saved(adaptive: Curve, sentence: str) -> None:
    assert describe(STATIC, adaptive) == sentence
