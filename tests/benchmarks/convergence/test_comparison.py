"""What is saved over static and FlexMoE, by literals."""

from __future__ import annotations

import math

import pytest

from benchmarks.convergence.comparison import Comparison, headlines
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.training import Run

# The losses that static has after 75 and 100 % of 40 steps are 3 and 2.
STATIC = [6.0, 5.0, 4.0, 3.0, 2.0]


def run(system: str, losses: list[float], dropped: float) -> Run:
    steps = 40
    loads = {"largest_load": [1.0] * steps, "busiest": [1.0] * steps, "moved_pairs": [0] * steps}
    return Run(
        system,
        0,
        train_loss=[0.0] * steps,
        dropped=[dropped] * steps,
        validation_steps=[0, 10, 20, 30, 40],
        validation_loss=losses,
        **loads,
    )


RUNS = {
    "static": run("static", STATIC, 0.5),
    "flexmoe-50": run("flexmoe-50", [6.0, 5.0, 3.0, 2.5, 2.0], 0.4),
    "flexmoe-10": run("flexmoe-10", [6.0, 4.0, 3.0, 2.0, 2.0], 0.25),
    "balanced": run("balanced", [6.0, 3.0, 2.0, 2.0, 2.0], 0.05),
}
TIMES = {"static": 1.0, "flexmoe-50": 1.2, "flexmoe-10": 1.5, "balanced": 0.9}


def test_steps_and_time_to_statics_losses() -> None:
    comparison = Comparison(Setting(), RUNS, TIMES)
    # 10 steps instead of 30, and 20 instead of 40.
    assert comparison.steps_saved("balanced", 0.75) == pytest.approx(1 - 10 / 30)
    assert comparison.steps_saved("balanced", 1.0) == pytest.approx(0.5)
    assert comparison.time_saved("balanced", 1.0, "measured", ["static"]) == pytest.approx(1 - 20 * 0.9 / 40)
    # The faster FlexMoE: 30 steps of 1.5, or 40 of 1.2.
    over = ["flexmoe-50", "flexmoe-10"]
    assert comparison.time_saved("balanced", 1.0, "measured", over) == pytest.approx(1 - 20 * 0.9 / 45)
    assert comparison.drops_saved("balanced", "flexmoe-10") == pytest.approx(0.8)


def test_one_that_never_gets_there_has_taken_its_whole_run() -> None:
    runs = {**RUNS, "flexmoe-10": run("flexmoe-10", [6.0, 5.0, 5.0, 5.0, 5.0], 0.25)}
    comparison = Comparison(Setting(), runs, TIMES)
    assert comparison.steps_saved("flexmoe-10", 1.0) == -math.inf
    assert comparison.time_saved("balanced", 1.0, "measured", ["flexmoe-10"]) == pytest.approx(1 - 20 * 0.9 / 60)


def test_headlines_are_means_over_two_losses_and_medians_over_seeds() -> None:
    saved = headlines(Setting(), {0: RUNS, 1: RUNS}, TIMES)
    assert list(saved) == ["flexmoe-50", "flexmoe-10", "balanced"]
    mean = round(((1 - 10 / 30) + 0.5) / 2, 4)
    assert saved["balanced"]["steps_saved_over_static"] == {"median": mean, "min": mean, "max": mean, "runs": 2}
    assert saved["balanced"]["drops_saved_over_static"]["median"] == 0.9
    assert saved["balanced"].keys() == {
        "steps_saved_over_static",
        *(
            f"{kind}time_saved_over_{other}"
            for kind in ("", "modelled_", "measured_")
            for other in ("static", "flexmoe")
        ),
        "drops_saved_over_static",
        "drops_saved_over_flexmoe_10",
    }
