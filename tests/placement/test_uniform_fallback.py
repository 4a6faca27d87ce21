"""When uniform replicas take over, and when the policy does again, on popularity that no policy can foresee.

U steps, E experts, W ranks.
"""

import numpy as np
import pytest

from swiftmoe_lightning.placement import ExpertLoad, Placer, make_policy, plan_dispatch
from swiftmoe_lightning.placement.placer import excess

E = 16


def erratic(num_steps: int) -> np.ndarray:
    """[U, E]: every step's shares are drawn anew, with a few hot experts among many cold ones."""
    rng = np.random.default_rng(0)
    return np.stack([rng.multinomial(4096, rng.dirichlet(np.full(E, 0.3))) for _ in range(num_steps)])


def running(num_steps: int) -> np.ndarray:
    """[U, E]: the hot expert of a step is cold in the next ones, so that plans by the last step are always wrong."""
    popularity_UE = np.ones((num_steps, E), dtype=np.int64)
    popularity_UE[np.arange(num_steps), np.arange(num_steps) * 5 % E] = 60
    return popularity_UE


def run(
    popularity_UE: np.ndarray, name: str, has_uniform_fallback: bool = True, sizes: tuple[int, int] = (4, 5)
) -> tuple[float, list[str], Placer]:
    """Mean excess of its steps, the reports, and the placer. sizes: ranks, slots of each."""
    policy = make_policy(name, *sizes)
    policy.has_uniform_fallback = has_uniform_fallback  # type: ignore[misc]
    reports: list[str] = []
    placer = Placer(lambda num_experts: policy, report=reports.append)
    placement = placer.planned({"layer": E})["layer"]
    lost = []
    for popularity_E in popularity_UE:
        load = ExpertLoad.of(popularity_E[None], plan_dispatch(popularity_E[None], placement), placement)
        lost.append(excess(load.wanted_W))
        placement = placer.next_placements({"layer": load})["layer"]
    return float(np.mean(lost)), reports, placer


@pytest.mark.parametrize("policy", ["balanced", "packed"])
def test_noise_does_not_switch_to_and_fro(policy: str) -> None:
    popularity_UE = erratic(200)
    lost, reports, _ = run(popularity_UE, policy)
    without, *_ = run(popularity_UE, policy, has_uniform_fallback=False)
    assert len(reports) <= 10
    assert lost <= without + 0.002


def test_uniform_replicas_stay_where_plans_are_always_wrong() -> None:
    popularity_UE = running(200)
    lost, reports, placer = run(popularity_UE, "packed", sizes=(8, 3))
    without, *_ = run(popularity_UE, "packed", has_uniform_fallback=False, sizes=(8, 3))
    assert lost < without
    assert len(reports) == 1
    assert placer.layers["layer"].num_placements == 200
    assert placer.layers["layer"].num_fallbacks > 180


def test_one_lost_placement_alone_does_not_fall_back() -> None:
    steady = np.full(E, 100)
    steady[0] = 160
    jump = np.roll(steady, 7)
    _, reports, placer = run(np.array([steady] * 5 + [jump] + [steady] * 5), "balanced")
    assert reports == []
    assert placer.layers["layer"].num_fallbacks == 0
