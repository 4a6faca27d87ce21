"""The GPU benchmark, as far as it goes without a GPU: that it checks, refuses and counts, not what it times."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from benchmarks import gpu, gpu_contenders, gpu_measure, gpu_stages
from benchmarks.gpu_check import checks, errors_of, outputs_and_gradients, reference
from benchmarks.gpu_contenders import Contender, contenders
from benchmarks.gpu_measure import Budget, Clock, measure_layer
from benchmarks.gpu_shapes import SHAPES, Case, Shape, make_case, route
from swiftmoe_lightning.kernels.triton import tiles

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

    def in_processes(tasks: Any, workers: int, tasks_of_each: int | None = None) -> list[dict[str, Any]]:
        calls.append(([task.args[0] for task in tasks], tasks_of_each))
        results: list[dict[str, Any]] = []
        for task in tasks:
            lost = tasks_of_each is None and not isinstance(task.args[0], Shape)
            checked = [TINY] if isinstance(task.args[0], Shape) else task.args[0]
            results += [asdict(of) | ({"error": "CUDA error: gone"} if lost else {"passed": True}) for of in checked]
        return results

    monkeypatch.setattr(gpu, "_in_processes", in_processes)
    results = gpu.check_all(found, [TINY], 2)
    assert len(results) == len(found) + 1
    assert all(result["passed"] for result in results)
    # bfloat16 and float16 first, each with all its routings; then one check a process.
    assert [len(group) for group in calls[0][0][1:]] == [2, 2]
    assert calls[1] == ([[check] for check in found], 1)


def test_every_tile_configuration_that_ships_is_checked() -> None:
    shipped = {name for name, value in vars(tiles).items() if isinstance(value, tiles.MlpTiles)}
    for tiny in (True, False):
        assert {check.tiles for check in checks(tiny)} == shipped | {""}


def tiny_case(dtype: torch.dtype = torch.float32) -> Case:
    return make_case(TINY, "zipf", "cpu", dtype)


@pytest.mark.parametrize(
    "name", ["ours, fused", "ours, grouped_mm", "HF grouped_mm", "torchtitan", "HF eager", "plain grouped_mm"]
)
def test_every_contender_computes_the_layer(name: str) -> None:
    found = contenders()[0] | {"plain grouped_mm": Contender(gpu_contenders._plain_grouped_mm)}
    case, contender = tiny_case(), found[name]
    weights = contender.prepare(case.weights)
    outputs = outputs_and_gradients(case, contender.run, weights, contender.restore)
    errors = errors_of(outputs, reference(case, range(4)))
    assert errors.keys() == {"out", "x", "scores", "gate_up_proj", "down_proj"}
    assert max(errors.values()) < 1e-5


def test_a_layer_is_measured_and_a_wrong_contender_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*inputs: Any) -> Tensor:
        return gpu_contenders.eager_loop(*inputs) + float("nan")

    def broken(*inputs: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    names = {"ours, fused": contenders()[0]["ours, grouped_mm"], "wrong": Contender(wrong), "broken": Contender(broken)}
    found = measure_layer(TINY, "hot", names, CPU, Budget(100))
    assert found["ours, fused"].keys() > {"ms_forward", "ms_forward_backward", "tflops", "peak_bytes_saved", "errors"}
    assert found["ours, fused"]["ms_forward"]["count"] == gpu_measure.ROUNDS
    assert found["wrong"]["skipped"] == "wrong"
    assert found["broken"]["skipped"] == "RuntimeError: no kernel image"
    gpu.print_layer("B", "hot", found)
    assert capsys.readouterr().out.splitlines()[1].startswith("B (OLMoE), hot")
    late = measure_layer(TINY, "hot", names, CPU, Budget(-1))
    assert all(of == {"skipped": "no time was left"} for of in late.values())


def test_a_run_on_a_gpu_leaves_out_what_is_wrong_and_notes_what_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checked = [
        {"tiles": "HALF_FEW", "dtype": "bfloat16", "passed": True},
        {"tiles": "", "dtype": "bfloat16", "passed": False, "errors": {"out": 0.1}},
    ]
    written: list[dict[str, Any]] = []

    def write(name: str, certificate: dict[str, Any], results: dict[str, Any]) -> Path:
        written.append(json.loads(json.dumps(certificate | results)))
        return Path(f"{name}.json")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "check_all", lambda *_: checked)
    monkeypatch.setattr(gpu, "birth_certificate", lambda: {"commit": "abc"})
    monkeypatch.setattr(gpu, "write_result", write)
    monkeypatch.setattr(gpu, "Clock", lambda device: CPU)
    monkeypatch.setattr(gpu, "ceilings", lambda clock: gpu_stages.ceilings(clock, elements=64, square=8))
    # One expert fewer than choices of a token cannot be routed.
    monkeypatch.setattr(gpu, "SHAPES", {"B": TINY, "Q": Shape("impossible", 4, 8, 8, 1, 2)})
    monkeypatch.setattr(gpu, "ROUTINGS", ("hot",))
    assert gpu.main(["--name", "other"]) == 1
    last = written[-1]
    assert last["commit"] == "abc"
    assert last["missing"]["ours, grouped_mm"] == "wrong: see correctness"
    assert "ModuleNotFoundError" in last["missing"]["SonicMoE"]
    assert last["layers"].keys() == last["stages"].keys() == {"B"}
    assert last["layers"]["B"]["hot"].keys() == {"ours, fused", "HF grouped_mm", "torchtitan", "HF eager"}
    assert [note.split(":")[0] for note in last["not_measured"]] == ["stages of Q", "Q, hot"]
    assert capsys.readouterr().out.splitlines()[-1] == "written to other.json"
    assert gpu.main(["--seconds", "0"]) == 1
    assert written[-1]["not_measured"][0] == "stages of B: no time was left"


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
