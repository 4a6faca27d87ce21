"""The GPU benchmark, as far as it goes without a GPU: that it checks, refuses and counts, not what it times."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import gpu, gpu_check, gpu_contenders, gpu_measure, gpu_stages, gpu_worker
from benchmarks.gpu_check import checks
from benchmarks.gpu_contenders import Candidate, contenders
from benchmarks.gpu_measure import Budget, Clock, measure_layer
from benchmarks.gpu_processes import LATE, results_of
from benchmarks.gpu_shapes import SHAPES, Shape, route
from swiftmoe_lightning.ops.triton.fused import tiles

TINY = Shape("tiny", 12, 16, 8, 4, 2)
CPU = Clock("cpu")


@pytest.fixture(autouse=True)
def _as_on_a_gpu() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def test_without_a_gpu_it_checks_and_says_that_it_times_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = [check for check in checks(tiny=True) if check.routing == "drops" or not check.tiles]
    monkeypatch.setattr(gpu, "checks", lambda tiny: few if tiny else None)
    assert gpu.main([]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("No GPU: kernels run under Triton's interpreter")
    assert second == f"correctness: {len(few)} of {len(few)} checks passed"


def test_what_is_wrong_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "checks", lambda tiny: checks(tiny)[-1:])
    monkeypatch.setattr("benchmarks.gpu_check.ours_grouped", lambda *inputs: gpu_contenders.eager_loop(*inputs) * 1.02)
    assert gpu.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_checks_whose_process_lost_its_gpu_run_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [check for check in checks(tiny=True) if check.tiles == "HALF_MANY"]
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
                given.append(([asdict(of) | lost for of in task.args[0]], None))
        return given

    monkeypatch.setattr(gpu, "results_of", answers)
    monkeypatch.setattr(gpu, "find_spec", lambda package: None if package in ("liger_kernel", "sonicmoe") else package)
    results, notes = gpu.check_all(found, [TINY], 2, 100)
    assert len(results) == len(found)
    assert all(result["passed"] for result in results)
    assert notes == [
        "ScatterMoE for tiny, compiled ahead: its process died with exit code -11",
        "ours, fused and ours, grouped_mm for tiny, compiled ahead: its process died with exit code -11",
    ]
    # bfloat16 and float16 first, each with all its routings; then one check a process.
    assert [len(group) for group in calls[0][2:]] == [2, 2]
    assert calls[1] == [[check] for check in found]


def test_a_process_that_dies_or_hangs_takes_nothing_with_it() -> None:
    tasks = [partial(math.sqrt, 4), partial(os._exit, 3), partial(math.sqrt, -1), partial(time.sleep, 100)]
    first, died, raised, late = results_of(tasks, 4, seconds=15)
    assert first == (2.0, None)
    assert died == (None, "its process died with exit code 3")
    assert raised[0] is None
    assert str(raised[1]).startswith("ValueError")
    assert late == (None, LATE)


def test_compiling_ahead_runs_those_who_are_named_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def run(shape: Shape, *inputs: Any) -> Tensor:
        shapes.append(shape)
        return gpu_contenders.eager_loop(shape, *inputs)

    found = {name: Candidate(run) for name in ("Liger", "ScatterMoE")}
    monkeypatch.setattr("benchmarks.gpu_check.contenders", lambda: (found, {}))
    gpu_check.warm_up(Shape("large", 32768, 16, 8, 64, 8), ["Liger", "SonicMoE"], "cpu")
    assert shapes == [Shape("large", 256, 16, 8, 16, 8)]


def test_every_tile_configuration_that_ships_is_checked() -> None:
    shipped = {name for name, value in vars(tiles).items() if isinstance(value, tiles.MlpTiles)}
    for tiny in (True, False):
        assert {check.tiles for check in checks(tiny)} == shipped | {""}


def test_a_layer_is_measured_and_a_wrong_contender_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*inputs: Any) -> Tensor:
        return gpu_contenders.eager_loop(*inputs) + float("nan")

    def broken(*inputs: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    names = {"ours, fused": contenders()[0]["ours, grouped_mm"], "wrong": Candidate(wrong), "broken": Candidate(broken)}
    found = measure_layer(TINY, "hot", names, CPU, Budget(100))
    assert found["ours, fused"].keys() > {
        "ms_forward",
        "ms_forward_backward",
        "tflops",
        "peak_bytes",
        "waits",
        "errors",
    }
    assert found["ours, fused"]["ms_forward"]["count"] == gpu_measure.ROUNDS
    assert found["wrong"]["skipped"] == "wrong"
    assert found["broken"]["skipped"] == "RuntimeError: no kernel image"
    gpu.print_layer("B", "hot", found)
    assert capsys.readouterr().out.splitlines()[1].startswith("B (OLMoE), hot")
    late = measure_layer(TINY, "hot", names, CPU, Budget(-1))
    assert all(of == {"skipped": "no time was left"} for of in late.values())


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What a run as on a GPU writes, time after time; it runs here, in this process, on TINY."""
    found: list[dict[str, Any]] = []

    def write(name: str, certificate: dict[str, Any], results: dict[str, Any]) -> Path:
        found.append(json.loads(json.dumps(certificate | results)))
        return Path(f"{name}.json")

    # One expert fewer than choices of a token cannot be routed.
    shapes = {"B": TINY, "Q": Shape("impossible", 4, 8, 8, 1, 2)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "birth_certificate", lambda: {"commit": "abc"})
    monkeypatch.setattr(gpu, "write_result", write)
    monkeypatch.setattr(gpu, "check_all", lambda *_: ([], []))
    monkeypatch.setattr(gpu, "listen", lambda task, seconds, silence, hear: task(hear))
    monkeypatch.setattr(gpu, "SHAPES", shapes)
    monkeypatch.setattr(gpu, "ROUTINGS", ("hot",))
    monkeypatch.setattr(gpu_worker, "SHAPES", shapes)
    monkeypatch.setattr(gpu_worker, "Clock", lambda device: CPU)
    monkeypatch.setattr(gpu_worker, "ceilings", lambda clock: gpu_stages.ceilings(clock, elements=64, square=8))
    return found


def test_a_run_on_a_gpu_leaves_out_what_is_wrong_and_notes_what_fails(
    written: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = [
        {"tiles": "HALF_FEW", "dtype": "bfloat16", "passed": True},
        {"tiles": "", "dtype": "bfloat16", "passed": False, "errors": {"out": 0.1}},
    ]
    monkeypatch.setattr(gpu, "check_all", lambda *_: (checked, ["compiled ahead: not"]))
    # Said to be missing, whether it is installed here or not.
    monkeypatch.setattr(gpu_contenders, "liger", lambda: 1 / 0)
    assert gpu.main(["--name", "other"]) == 1
    assert written[0].keys() == {"commit", "name", "shapes", "correctness", "not_measured"}
    last = written[-1]
    assert last["commit"] == "abc"
    assert last["missing"]["ours, grouped_mm"] == "wrong: see correctness"
    assert "ZeroDivisionError" in last["missing"]["Liger"]
    assert last["layers"].keys() == last["stages"].keys() == {"B"}
    here = {"ours, fused", "HF grouped_mm", "torchtitan", "torchtitan, atomic", "HF eager"}
    assert last["layers"]["B"]["hot"].keys() - {"ScatterMoE", "SonicMoE"} == here
    assert [note.split(":")[0] for note in last["not_measured"]] == ["compiled ahead", "stages of Q", "Q, hot"]
    assert capsys.readouterr().out.splitlines()[-1] == "written to other.json"
    assert gpu.main(["--seconds", "0"]) == 1
    assert written[-1]["not_measured"][1] == f"ceilings of the GPU: {LATE}"


def test_a_lost_process_costs_the_one_who_ran_in_it(
    written: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(BaseException):
        pass

    dies_at = [("B, hot", "HF eager"), ("B, hot", "")]
    starts = []

    def listen(task: Any, seconds: float, silence: float, hear: Any) -> str | None:
        starts.append(([str(part) for part in task.args[0]], "HF eager" in task.args[1], task.args[2] is None))
        now = dies_at.pop(0) if dies_at else None

        def hear_until_dead(message: Any) -> None:
            hear(message)
            if message[0] == "begins" and (str(message[1]), message[2]) == now:
                raise Dead

        try:
            task(hear_until_dead)
        except Dead:
            return "its process died with exit code -11"
        return None

    monkeypatch.setattr(gpu, "listen", listen)
    monkeypatch.setattr(gpu, "ROUTINGS", ("hot", "zipf"))
    assert gpu.main(["--shapes", "B"]) == 0
    assert starts == [
        (["ceilings of the GPU", "stages of B", "B, hot", "B, zipf"], False, True),
        (["B, hot", "B, zipf"], True, False),
        (["B, zipf"], True, False),
    ]
    assert written[-1]["missing"]["HF eager"] == "B, hot: its process died with exit code -11"
    assert written[-1]["not_measured"] == ["B, hot: its process died with exit code -11"]
    assert written[-1]["layers"]["B"].keys() == {"zipf"}


def test_all_stages_and_ceilings_run() -> None:
    found = gpu_stages.ceilings(CPU, elements=64, square=8)
    assert {"ms", "gb_per_s"} == found["copy"].keys()
    stages = gpu_stages.measure_stages(Shape("tiny", 4, 16, 8, 2, 1, "gelu"), CPU, copy_gb_per_s=1.0)
    assert {"sort_choices", "permute", "combine", "up", "down", "dz", "dx", "dW up", "dW down"} < stages.keys()
    assert all(("tflops" in rate) != ("share_of_copy" in rate) for rate in stages.values())


@pytest.mark.parametrize("routing", ["balanced", "zipf", "hot", "one", "empty", "drops"])
def test_a_token_goes_to_different_experts(routing: str) -> None:
    shape = Shape("many tokens", 4000, 8, 8, 16, 2)
    ids_TK = route(shape, routing, torch.Generator().manual_seed(0))
    assert ids_TK.shape == (4000, 2)
    kept_TK = ids_TK < 16
    assert bool(((ids_TK[:, 0] != ids_TK[:, 1]) | ~kept_TK.all(-1)).all())
    counts_E = torch.bincount(ids_TK.flatten(), minlength=17)
    assert counts_E.sum() == 8000
    share = float(counts_E[:16].max() / 500)
    low, high = {"balanced": (1, 1.2), "zipf": (2.5, 8), "hot": (3.8, 4.2), "one": (8, 8)}.get(routing, (0, 3))
    assert low <= share <= high
    assert (counts_E[16] > 0) == (routing == "drops")
    if routing == "empty":
        assert not counts_E[1:16:2].any()


def test_flops_are_those_of_the_products() -> None:
    assert SHAPES["B"].flops_forward == 6 * 32768 * 8 * 2048 * 1024
    assert SHAPES["D"].flops_forward == 4 * 32768 * 768 * 3072


def test_an_unknown_shape_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--shapes", "B,X"])
    assert "--shapes must be some of B, Q, S, C, A, D, C2, B512, got X" in capsys.readouterr().err
