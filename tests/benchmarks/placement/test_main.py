"""The placement benchmark on a small trace: that all policies are replayed and drawn, not their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from benchmarks.placement import __main__ as command
from benchmarks.placement import host_time, scenarios, whole_matrices
from benchmarks.placement.measures import switch_domains
from swiftmoe_lightning.analysis import CANDIDATES, SCENARIOS
from swiftmoe_lightning.placement import Placement


def test_a_small_trace_is_replayed_tabled_and_drawn(
    result: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "time_planning", lambda seconds: {"seconds": seconds})
    counts_ULE = np.random.default_rng(0).integers(0, 50, (3, 1, 8))
    np.savez(tmp_path / "trace.npz", counts=counts_ULE)
    command.main(f"{tmp_path / 'trace.npz'} --name tiny --ranks 4".split())
    written = result("tiny")
    assert written.keys() == {"certificate", "ranks", "planning", "rows"}
    settings = [(row["slots_per_rank"], row["capacity_factor"]) for row in written["rows"]]
    assert settings == [(slots, factor) for slots in (2, 4, 8) for factor in (1.0, 1.25, None)]
    for row in written["rows"]:
        assert row["policies"].keys() == CANDIDATES.keys()
        for outcome in row["policies"].values():
            assert row["bounds"]["dropped"] <= outcome["dropped"] + 1e-9
            assert outcome["imbalance"] >= 1
    tables = (tmp_path / "tiny.md").read_text()
    assert "## trace, dropless" in tables
    assert tables.count("\n| balanced |") == 3
    assert (tmp_path / "tiny_frontier.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.splitlines()[-1].endswith("tiny.json, tiny.md and tiny_frontier.png")


def test_plans_for_another_domain_are_compared_with_uniform_ones() -> None:
    """Domains alike drop nothing more in each other's plan: uniform popularity fits any of them."""
    rows = switch_domains(np.full((2, 1, 16), 60))["rows"]
    assert {row["policy"] for row in rows} == {"balanced", "packed", "symi"}
    assert {(row["ranks"], row["slots_per_rank"]) for row in rows} == {(8, 12), (16, 6), (8, 9)}
    for row in rows:
        if row["policy"] != "symi":
            assert row["dropped_worst"] == 0


def test_host_time_has_a_row_for_each_number_of_ranks_and_node(
    result: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_time, "RANKS", (8, 16))
    host_time.main(["--name", "tiny", "--pairs", "2"])
    rows = result("tiny")["rows"]
    assert [(row["ranks"], row["ranks_per_node"], row["slots_per_rank"]) for row in rows] == [
        (8, 1, 40),
        (8, 8, 40),
        (16, 1, 20),
        (16, 8, 20),
    ]
    for row in rows:
        assert row["split_us"]["count"] == row["first_split_us"]["count"] == row["transfer_us"]["count"] == 4


def test_all_scenarios_are_tabled_without_times(
    result: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scenarios, "SLOTS", (5,))
    scenarios.main(["--name", "tiny", "--steps", "1"])
    rows = result("tiny")["rows"]
    assert [row["trace"] for row in rows[::2]] == list(SCENARIOS)
    assert {row["capacity_factor"] for row in rows} == {1.0, None}
    assert not [name for row in rows for values in row["policies"].values() for name in values if "seconds" in name]
    assert "## rotating, dropless" in (tmp_path / "tiny.md").read_text()


def test_bytes_of_whole_matrices_and_of_rows() -> None:
    # Two experts on two ranks, each on both: a third of an expert's weights a matrix, three of the six on each rank.
    both = Placement(np.array([0, 1, 0, 1]), num_experts=2, world_size=2)
    # Collect and distribute: each rank sends what the other owns, the half of both experts. Muon: a half of the half in
    # half the bytes, twice.
    assert whole_matrices.by_matrices(both, both, 1.0) == pytest.approx((4, 2))
    assert whole_matrices.by_rows(both, both, 1.0) == pytest.approx((4 + 1, 2 + 0.5))
    # Expert 0 on rank 0 alone, 1 on rank 1: matrices 0, 2 and 4 are rank 0's, of which 4 is the other's expert's.
    apart = Placement(np.array([0, 1]), num_experts=2, world_size=2)
    assert whole_matrices.by_matrices(apart, apart, 1.0) == pytest.approx((4 / 3, 2 / 3))


def test_whole_matrices_has_a_row_for_each_scenario_and_size(
    result: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_matrices, "SIZES", ((4, 8),))
    whole_matrices.main(["--name", "tiny", "--steps", "3"])
    rows = result("tiny")["rows"]
    assert [row["scenario"] for row in rows] == [*SCENARIOS]
    # Without momentum on the wire, whole matrices are always less in all.
    assert all(row["bfloat16"]["total_ratio"] < row["float32"]["total_ratio"] < 1 for row in rows)
