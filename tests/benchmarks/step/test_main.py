"""The step benchmark on two ranks and a tiny model: that everything is measured and adds up, not how fast it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.links import missing_for_links
from benchmarks.step import __main__ as command

TINY = (
    "--ranks 2 --rounds 1 --pairs 1 --steps 1 --repeats 2 --layers 1 --dim 32 --hidden-dim 16 --experts 4 --tokens 32 "
    "--systems packed,fsdp2,ddp --name tiny"
)
FIGURES = {
    "adapt_over_frozen",
    "control_fraction",
    "weight_phases_fraction",
    "bytes_over_paper",
    "bytes_over_paper_16_ranks",
    "time_over_paper",
    "over_deepspeed",
    "over_hf_ep",
    "over_fsdp2",
    "over_ddp",
}


def test_a_small_run_measures_everything(
    result: Callable[[str], dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([*TINY.split(), "--json"])
    written = result("tiny")
    settings = {"certificate", "sizes", "effort", "routing", "links"}
    ours = {
        "losses",
        "phases_ms",
        "weight_phases_fraction",
        "control_fraction",
        "split_exchanges_ms",
        "update",
        "bytes",
    }
    assert written.keys() == {"systems", "adapting", "control", "paper", "bytes_over_paper_16_ranks"} | settings | ours
    assert written["systems"].keys() == {"packed", "fsdp2", "ddp"}
    for system in written["systems"].values():
        assert system["losses"] == pytest.approx(written["losses"], abs=1e-4)
        assert system["step_ms"]["median"] > 0
        assert system["ours_over_it"]["runs"] == 1
    # Both keep bytes and balance, and only one of them moves experts.
    run, baseline = (written["adapting"][role] for role in ("run", "baseline"))
    assert baseline["pairs_moved_per_step"] == 0
    assert run["weight_bytes_per_step"] == baseline["weight_bytes_per_step"] > 0
    assert written["bytes"]["collect_all_ranks"] == written["bytes"]["formula_all_ranks"] > 0
    assert written["paper"]["papers_bytes"] > 0
    assert written["update"]["wall_ratio"]["count"] == 2
    assert written["phases_ms"].keys() >= {"forward", "backward", "update", "other"}
    lines = capsys.readouterr().out.splitlines()
    last = json.loads(lines[-1])
    assert last.keys() == FIGURES
    assert last["over_deepspeed"] is None
    assert last["over_ddp"] == written["systems"]["ddp"]["ours_over_it"]
    assert last["adapt_over_frozen"].keys() == {"median", "min", "max", "runs"}
    assert lines[-2].endswith("tiny.json and runs/step/tiny.trace.json")
    trace = json.loads(Path("runs/step/tiny.trace.json").read_text())
    assert {"swiftmoe::forward", "swiftmoe::backward"} <= {event.get("name") for event in trace["traceEvents"]}


def test_nodes_behind_links_count_what_leaves_them(result: Callable[[str], dict[str, Any]]) -> None:
    if missing := missing_for_links():
        pytest.skip(missing)
    try:
        command.main([*TINY.replace("packed,fsdp2,ddp", "ddp").split(), "--mbit", "1000"])
    except RuntimeError as error:
        pytest.skip(str(error))
    written = result("tiny")
    assert (written["links"]["mbit"], written["links"]["ranks_per_node"]) == (1000, 1)
    ddp = written["systems"]["ddp"]
    # An all-reduce of all gradients sends each rank's half twice.
    parameters = 4 * 3 * 32 * 16 + 4 * 32 * 32 + 2 * 256 * 32 + 4 * 32 + 3 * 32
    assert ddp["link_bytes_per_step"] > 2 * 4 * parameters
    # Ours sends the experts twice, and tokens.
    assert ddp["ours"]["link_bytes_per_step"] > ddp["ours"]["weight_bytes_per_step"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ranks 3", "--ranks must be even and divide --dim, --hidden-dim and --experts, got 3"),
        ("--systems ddp,another", "got another"),
        ("--tokens 200", "--tokens must be a multiple of 128, or at most as many, got 200"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(options.split())
    assert message in capsys.readouterr().err


def test_large_changes_the_defaults_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def stop(*arguments: Any, **_: Any) -> Any:
        plans.append(arguments[2])
        raise InterruptedError

    monkeypatch.setattr(command, "run_ranks", stop)
    with pytest.raises(InterruptedError):
        command.main(["--large", "--layers", "2", "--systems", "ddp"])
    sizes = plans[0].workload.sizes
    assert (sizes.dim, sizes.layers) == (512, 2)
