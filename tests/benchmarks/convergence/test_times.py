"""Step times of each kind, by literals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.convergence.settings import Setting
from benchmarks.convergence.times import (
    PAPER_CLUSTER,
    Cluster,
    measured_step_times,
    modelled_seconds,
    paper_step_times,
    recorded_step_times,
)
from benchmarks.convergence.training import Run
from swiftmoe_lightning.analysis.cost import Machine


def test_the_papers_step_times_are_minutes_over_steps() -> None:
    expected = {"static": 1, "flexmoe-100": 1.161, "flexmoe-50": 1.178, "flexmoe-10": 1.311, "symi": 0.971}
    times = paper_step_times()
    assert {system: times[system] for system in expected} == pytest.approx(expected, abs=1e-3)
    assert times["balanced"] == times["packed"] == times["dropless"] == times["symi"]
    assert times["deepspeed"] == 1


def test_modelled_seconds_are_compute_exchange_weights_and_moves() -> None:
    # An assignment takes 30 FLOP at 10 a second, a byte a tenth of a second.
    machine = Machine(num_ranks=4, slots_per_rank=2, expert_bytes=10, link_bytes=10, flops=10, assignment_bytes=0)
    cluster = Cluster(machine=machine, tokens_per_rank=5, num_layers=3, dense_seconds=7.0)
    setting = Setting(num_layers=2)
    ours = Run("balanced", 0, largest_load=[1.2], busiest=[0.5], moved_pairs=[8])
    # 5 * 1.2 assignments, and both weight phases of half an expert; moves cost nothing.
    assert modelled_seconds(ours, setting, cluster) == pytest.approx([3 * (6 * 3 + 2 * 0.5 * 10 / 10) + 7])
    # Every slot sends three quarters of an expert; four pairs a layer take weights and state (9 experts) along.
    theirs = replace(ours, system="flexmoe-10")
    assert modelled_seconds(theirs, setting, cluster) == pytest.approx(
        [3 * (6 * 3 + 2 * 1.5 * 10 / 10 + 4 * 90 / 4 / 10) + 7]
    )


def test_the_papers_cluster_spends_most_of_a_static_step_on_weights() -> None:
    run = Run("static", 0, largest_load=[1.0], busiest=[0.9], moved_pairs=[0])
    machine, (seconds,) = PAPER_CLUSTER.machine, modelled_seconds(run, Setting())
    weights = PAPER_CLUSTER.num_layers * 2 * 3.75 * machine.expert_bytes / 12.5e9
    assert 0.5 < weights / seconds < 0.9


def test_measured_step_times_are_medians_with_a_capacity(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    assert measured_step_times(path) == {}
    ratios = {"step_time_over_static": {"static": {"median": 1.0}, "balanced": {"median": 1.2}}}
    path.write_text(json.dumps({"capacity 1": ratios, "dropless": {}}))
    assert measured_step_times(path) == {"static": 1.0, "balanced": 1.2}


def test_recorded_step_times_are_told_apart_by_their_links(tmp_path: Path) -> None:
    assert recorded_step_times(tmp_path) == {}
    for name, content in {
        "convergence.step_times": {"capacity 1": {"a": 1}, "dropless": {}},
        "convergence.step_times_100mbit": {"mbit": 100, "capacity 1": {"a": 2}},
        "convergence.step_times_only_dropless": {"mbit": None, "dropless": {}},
        "convergence_quick": {"capacity 1": {"a": 3}},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert recorded_step_times(tmp_path) == {"loopback": {"a": 1}, "100 Mbit/s links": {"a": 2}}
