"""A run as on a GPU: what it writes, leaves out and tries again, on tiny shapes and in this process."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import peers, report, run, stages, worker
from benchmarks.gpu.check import checks
from benchmarks.gpu.processes import LATE
from benchmarks.gpu.shapes import Shape
from tests.benchmarks.gpu.cases import CPU, TINY


def test_checks_whose_process_lost_its_gpu_run_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [check for check in checks(tiny=True) if check.tiles == "HALF_MANY"]
    calls = []

    def answers(tasks: Any, workers: int, seconds: float) -> list[tuple[Any, str | None]]:
        calls.append([task.args[0] for task in tasks])
        given: list[tuple[Any, str | None]] = []
        for task in tasks:
            if isinstance(task.args[0], Shape):
                given.append((None, "its process died with exit code -11"))
            elif len(calls) == 1 and task.args[0][0].dtype == "float16":
                given.append((None, LATE))
            else:
                lost = {"error": "gone", "lost_gpu": True} if len(calls) == 1 else {"passed": True}
                given.append(([asdict(check) | lost for check in task.args[0]], None))
        return given

    monkeypatch.setattr(run, "results_of", answers)
    monkeypatch.setattr(run, "find_spec", lambda package: None if package in ("liger_kernel", "sonicmoe") else package)
    results, notes = run.check_all(every, [TINY], 2, 100)
    assert len(results) == len(every)
    assert all(result["passed"] for result in results)
    assert notes == [
        "ScatterMoE for tiny, compiled ahead: its process died with exit code -11",
        "ours, fused and ours, grouped_mm for tiny, compiled ahead: its process died with exit code -11",
    ]
    # bfloat16 and float16 first, each with all its routings; then one check a process.
    assert [len(group) for group in calls[0][2:]] == [2, 2]
    assert calls[1] == [[check] for check in every]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a run as on a GPU writes, time after time; it runs here, in this process, on TINY."""
    results_so_far: list[dict[str, Any]] = []

    def write(name: str, provenance: dict[str, Any], results: dict[str, Any]) -> Path:
        results_so_far.append(json.loads(json.dumps(provenance | results)))
        return Path(f"{name}.json")

    # A token cannot go to 2 different experts of 1.
    shapes = {"B": TINY, "Q": Shape("impossible", 4, 8, 8, 1, 2)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "collect_provenance", lambda: {"commit": "abc"})
    monkeypatch.setattr(command, "check_all", lambda *_: ([], []))
    monkeypatch.setattr(run, "listen", lambda task, seconds, silence, receive: task(receive))
    monkeypatch.setattr(run, "ROUTINGS", ("hot",))
    for module in (command, run):
        monkeypatch.setattr(module, "write_result", write)
    for module in (command, report, worker):
        monkeypatch.setattr(module, "SHAPES", shapes)
    monkeypatch.setattr(worker, "Clock", lambda device: CPU)
    monkeypatch.setattr(worker, "ceilings", lambda clock: stages.ceilings(clock, elements=64, square=8))
    return results_so_far


def test_a_run_on_a_gpu_leaves_out_what_is_wrong_and_notes_what_fails(
    written: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = [
        {"tiles": "HALF_FEW", "dtype": "bfloat16", "passed": True},
        {"tiles": "", "dtype": "bfloat16", "passed": False, "errors": {"out": 0.1}},
    ]
    monkeypatch.setattr(command, "check_all", lambda *_: (checked, ["compiled ahead: not"]))
    # Missing, whether it is installed here or not.
    monkeypatch.setattr(peers, "liger", lambda: 1 / 0)
    assert command.main(["--name", "other"]) == 1
    assert written[0].keys() == {"commit", "name", "shapes", "correctness", "not_measured"}
    last = written[-1]
    assert last["commit"] == "abc"
    assert last["missing"]["ours, grouped_mm"] == "wrong: see correctness"
    assert "ZeroDivisionError" in last["missing"]["Liger"]
    assert last["layers"].keys() == last["stages"].keys() == {"B"}
    expected = {"ours, fused", "HF grouped_mm", "torchtitan", "torchtitan, atomic", "HF eager"}
    assert last["layers"]["B"]["hot"].keys() - {"ScatterMoE", "SonicMoE"} == expected
    assert [note.split(":")[0] for note in last["not_measured"]] == ["compiled ahead", "stages of Q", "Q, hot"]
    assert capsys.readouterr().out.splitlines()[-1] == "written to other.json"
    assert command.main(["--seconds", "0"]) == 1
    assert written[-1]["not_measured"][1] == f"ceilings of the GPU: {LATE}"


@pytest.mark.nightly
def test_a_lost_process_leaves_out_the_candidate_that_ran_in_it(
    written: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(BaseException):
        pass

    dies_at = [("B, hot", "HF eager"), ("B, hot", "")]
    starts = []

    def listen(task: Any, seconds: float, silence: float, receive: Any) -> str | None:
        starts.append(([str(part) for part in task.args[0]], "HF eager" in task.args[1], task.args[2] is None))
        now = dies_at.pop(0) if dies_at else None

        def receive_until_dead(message: Any) -> None:
            receive(message)
            if message[0] == "begins" and (str(message[1]), message[2]) == now:
                raise Dead

        try:
            task(receive_until_dead)
        except Dead:
            return "its process died with exit code -11"
        return None

    monkeypatch.setattr(run, "listen", listen)
    monkeypatch.setattr(run, "ROUTINGS", ("hot", "zipf"))
    assert command.main(["--shapes", "B"]) == 0
    assert starts == [
        (["ceilings of the GPU", "stages of B", "B, hot", "B, zipf"], False, True),
        (["B, hot", "B, zipf"], True, False),
        (["B, zipf"], True, False),
    ]
    assert written[-1]["missing"]["HF eager"] == "B, hot: its process died with exit code -11"
    assert written[-1]["not_measured"] == ["B, hot: its process died with exit code -11"]
    assert written[-1]["layers"]["B"].keys() == {"zipf"}
