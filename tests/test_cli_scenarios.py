"""`swiftmoe plan --scenario` and `swiftmoe report --scenario`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from swiftmoe_lightning.analysis import SCENARIOS
from swiftmoe_lightning.cli import app

SMALL = ("--experts", "8", "--ranks", "4", "--steps", "12")


def plan(*argv: str) -> Any:
    return CliRunner().invoke(app, ["plan", *argv])


def test_a_scenario_is_planned_as_a_trace_is() -> None:
    result = plan("--scenario", "rotating", *SMALL)
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    assert "12 steps, 4 layers, 8 experts on 4 ranks of 3 slots, dropless, plans 1 step old" in text
    argv = ("--scenario", "rotating", *SMALL, "--policies", "balanced", "--slots", "4", "--json")
    first, again, other = (json.loads(plan(*argv, "--seed", seed).stdout) for seed in ("0", "0", "1"))
    assert (first["ranks"], first["slots_per_rank"], first["trace"]["experts"]) == (4, 4, 8)
    lost = [of_seed["policies"]["balanced"]["imbalance"] for of_seed in (first, again, other)]
    assert lost[0] == lost[1] != lost[2]


def test_all_scenarios_are_one_table_beside_the_bounds() -> None:
    result = plan("--scenario", "all", *SMALL, "--policies", "balanced,static", "--capacity-factor", "1")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [f"replaying {name} ..." for name in SCENARIOS]
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.strip()}
    # The paper's policy is there, asked for or not, since its bytes are the unit.
    assert rows["scenario"] == ["scenario", "balanced", "static", "symi", "best"]
    assert [name for name in rows if name in SCENARIOS] == list(SCENARIOS)
    for name in SCENARIOS:
        *policies, best = [cell for cell in rows[name][1:] if cell.endswith("%")]
        assert len(policies) == 3
        assert all(float(best[:-1]) <= float(dropped[:-1]) for dropped in policies)
    text = " ".join(result.stdout.split())
    assert "dropped / bytes of both weight phases" in text
    for name, scenario in SCENARIOS.items():
        assert f"{name}: {scenario.about}" in text


def test_all_scenarios_as_json_are_plans_by_name() -> None:
    result = plan("--scenario", "all", *SMALL, "--policies", "symi", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    plans = json.loads(result.stdout)
    assert list(plans) == list(SCENARIOS)
    assert all(list(values["policies"]) == ["symi"] for values in plans.values())


def test_dropless_the_table_has_imbalance_and_bytes_over_the_papers() -> None:
    argv = ("--scenario", "all", *SMALL, "--policies", "symi")
    rows = {line.split()[0]: line.split() for line in plan(*argv).stdout.splitlines() if line.strip()}
    values = json.loads(plan(*argv, "--json").stdout)["zipf"]
    numbers = values["policies"]["symi"]
    sent = (numbers["bytes_gradients"] + numbers["bytes_weights"]) / numbers["bytes_paper"]
    best = values["bounds"]["imbalance"]
    assert rows["zipf"] == ["zipf", f"{numbers['imbalance']:.3f}", "/", f"{sent:.2f}", f"{best:.3f}"]


def test_slots_and_groups_are_recommended_for_a_scenario() -> None:
    result = plan("--scenario", "hot", *SMALL, "--recommend", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    # Each rank has its own draws, so groups of all sizes are known.
    assert set(found["knees"]) == {"1", "2", "4"}


def test_a_report_of_a_scenario_has_its_name(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    argv = ["report", "--scenario", "burst", "--ranks", "2", "--policies", "static", "--out", str(out)]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 0, result.output
    assert "<title>burst" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give a TRACE, or --scenario NAME with one of even, zipf, "),
        (["trace.npz", "--scenario", "hot"], "give a TRACE, or --scenario NAME"),
        (["--scenario", "calm"], "scenario must be one of 'even', "),
        (
            ["--scenario", "all", "--steps", "2", "--recommend"],
            "--scenario all is for `swiftmoe plan` without --recommend. Name one",
        ),
        (["trace.npz", "--seed", "1"], "--seed is for scenarios. Add --scenario, or leave it out."),
        (["trace.npz", "--recommend", "--experts", "8"], "--experts is for scenarios."),
        (["--scenario", "hot", "--steps", "1000000000"], "a scenario would take"),
        (["--scenario", "hot", "--picture", "x.png"], "--picture is for recommendations."),
        (["--scenario", "hot", "--experts", "80", "--slots", "4"], "64 slots cannot hold 80 experts"),
    ],
)
def test_what_does_not_go_together_ends_with_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("trace.npz", counts=np.ones((1, 1, 4)))
    result = plan(*argv)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("swiftmoe plan: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_report_needs_one_trace(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "page.html")]
    for argv, message in (([], "give a TRACE, or --scenario NAME"), (["--scenario", "all"], "Name one of even, ")):
        result = CliRunner().invoke(app, ["report", *argv, *out])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("swiftmoe report: ")
        assert message in result.stderr
