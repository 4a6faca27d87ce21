from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning.analysis import CANDIDATES, Machine, PlanOptions, Trace, make_plan
from swiftmoe_lightning.analysis.report.page import PageData, write_page
from swiftmoe_lightning.analysis.report.plan_page import plan_page

U, W, L, E, SLOTS = 3, 2, 2, 4, 3
COUNTS = np.random.default_rng(0).integers(1, 20, (U, W, L, E))
STEPS = np.array([7, 9, 12])
RECORDED = {
    "replicas": np.full((U, L, E), 1) + np.eye(1, E, dtype=int) * 2,
    "loads": np.arange(U * L * W).reshape(U, L, W) + 10,
    "dropped": np.arange(U * L).reshape(U, L),
    "moved": np.ones((U, L), dtype=int),
}


def page(recorded: dict[str, np.ndarray] | None = None, num_ranks: int = W, **options: Any) -> PageData:
    trace = Trace(COUNTS, ["a", "b"], STEPS, recorded={} if recorded is None else recorded)
    machine = Machine(num_ranks=num_ranks, slots_per_rank=SLOTS)
    return plan_page(make_plan(trace, machine, PlanOptions(**options)), title="a trace")


def table(data: PageData, folder: Path) -> dict[str, list[str]]:
    """The page's table: policy -> its cells."""
    write_page(folder / "page.html", data)
    rows = re.findall(
        r'<tr><th scope="row" data-policy.*?>(.*?)<.*?</th>(.*?)</tr>', (folder / "page.html").read_text()
    )
    return {name: re.findall("<td>(.*?)</td>", cells) for name, cells in rows}


def test_the_run_itself_comes_first_with_its_own_numbers(tmp_path: Path) -> None:
    data = page(RECORDED, policies=["balanced", "lpt"], capacity_factor=1.25)
    assert [(policy.name, policy.label) for policy in data.policies] == [
        ("recorded", "the run itself"),
        ("balanced", "pooled rank budget"),
        ("lpt", "re-implementation"),
    ]
    run = data.policies[0]
    for name, array in (
        ("replicas", run.replicas_ULE),
        ("loads", run.load_ULW),
        ("dropped", run.dropped_UL),
        ("moved", run.moved_UL),
    ):
        np.testing.assert_array_equal(array, RECORDED[name])
    assert (run.bytes_gradients, run.bytes_weights, run.bytes_paper, run.bytes_state_moved) == (None,) * 4
    assert run.losses == {}
    # 0 + 1 + ... + 5 dropped; loads r and r + 1 with r = 10, 12, ..., 20; two layers with one move each.
    dropped = 15 / COUNTS.sum()
    imbalance = [(r + 1) / (r + 0.5) for r in range(10, 21, 2)]
    assert table(data, tmp_path)["recorded"] == [
        f"{100 * dropped:.2f}",
        f"{100 * (1 - dropped):.2f}",
        f"{sum(imbalance) / 6:.3f}",
        f"{imbalance[0]:.2f}",
        *["–"] * 4,
        "2.0",
    ]


def test_a_run_on_other_ranks_than_the_plans_is_shown_all_the_same(tmp_path: Path) -> None:
    data = page(RECORDED, num_ranks=4, policies=["balanced"])
    assert [policy.load_ULW.shape for policy in data.policies] == [(U, L, W), (U, L, 4)]
    assert list(table(data, tmp_path)) == ["recorded", "balanced"]


def test_a_run_without_replicas_is_shown_without_them() -> None:
    data = page({name: array for name, array in RECORDED.items() if name != "replicas"}, policies=["balanced"])
    assert data.policies[0].name == "recorded"
    assert data.policies[0].replicas_ULE is None


@pytest.mark.parametrize("missing", ["loads", "dropped", "moved"])
def test_a_run_of_which_too_little_is_known_is_not_shown(missing: str) -> None:
    data = page({name: array for name, array in RECORDED.items() if name != missing}, policies=["balanced"])
    assert [policy.name for policy in data.policies] == ["balanced"]


@pytest.mark.parametrize("capacity_factor", [None, 1.0])
def test_the_page_has_every_series_of_every_policy(capacity_factor: float | None) -> None:
    data = page(policies=[*CANDIDATES], capacity_factor=capacity_factor)
    assert [policy.name for policy in data.policies] == list(CANDIDATES)
    assert (data.title, data.subtitle) == ("a trace", "2 ranks of 3 slots, plans 1 step old")
    assert data.counts_ULE.tolist() == COUNTS.sum(1).tolist()
    assert (data.step_U.tolist(), data.layers, data.capacity_factor) == ([7, 9, 12], ("a", "b"), capacity_factor)
    for policy in data.policies:
        assert policy.replicas_ULE is not None
        assert policy.replicas_ULE.shape == (U, L, E)
        assert policy.load_ULW.shape == (U, L, W)
        assert policy.dropped_UL.shape == policy.moved_UL.shape == (U, L)
        assert (policy.load_ULW.sum(2) + policy.dropped_UL == data.counts_ULE.sum(2)).all()
        assert policy.dropped_UL.any() <= (capacity_factor is not None)
        assert list(policy.losses) == ["split", "placement", "prediction", "floor", "rounding"]
        assert policy.bytes_gradients == policy.bytes_weights > 0


def test_the_pages_table_has_the_plans_numbers(tmp_path: Path) -> None:
    trace, machine = Trace(COUNTS), Machine(num_ranks=W, slots_per_rank=SLOTS, expert_bytes=1000)
    made = make_plan(trace, machine, PlanOptions(policies=["symi", "lpt"], capacity_factor=1.0))
    cells = table(plan_page(made, "a trace"), tmp_path)
    for name, values in made.as_json()["policies"].items():
        assert cells[name][0] == f"{100 * values['dropped']:.2f}"
        assert cells[name][2:4] == [f"{values['imbalance']:.3f}", f"{values['imbalance_max']:.2f}"]
        assert cells[name][8] == f"{values['replicas_moved']:.1f}"
    # G (D - D / 2) in each of two layers.
    num_pairs = made.as_json()["policies"]["symi"]["pairs"]
    assert cells["symi"][4] == f"{num_pairs * 1000 / 2 * 2 / 1000:.3g} kB"


@pytest.mark.parametrize(("lag", "text"), [(0, "from the step itself"), (1, "1 step old"), (3, "3 steps old")])
def test_the_subtitle_says_how_old_plans_are(lag: int, text: str) -> None:
    assert page(policies=["static"], lag=lag).subtitle == f"2 ranks of 3 slots, plans {text}"
