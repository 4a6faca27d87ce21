"""A layer measured beside others, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks.gpu import measure, peers, report
from benchmarks.gpu.candidates import Candidate, candidates
from benchmarks.gpu.measure import Budget, measure_layer
from tests.benchmarks.gpu.cases import CPU, TINY


def test_a_layer_is_measured_and_a_wrong_candidate_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*inputs: Any) -> Tensor:
        return peers.eager_loop(*inputs) + float("nan")

    def broken(*inputs: Any) -> Tensor:
        raise RuntimeError("no kernel image")

    names = {"ours, fused": candidates()[0]["ours, grouped_mm"], "wrong": Candidate(wrong), "broken": Candidate(broken)}
    results = measure_layer(TINY, "hot", names, CPU, Budget(100))
    assert results["ours, fused"].keys() > {
        "ms_forward",
        "ms_forward_backward",
        "tflops",
        "peak_bytes",
        "waits",
        "errors",
    }
    assert results["ours, fused"]["ms_forward"]["count"] == measure.ROUNDS
    assert results["wrong"]["skipped"] == "wrong"
    assert results["broken"]["skipped"] == "RuntimeError: no kernel image"
    report.print_layer("B", "hot", results)
    assert capsys.readouterr().out.splitlines()[1].startswith("B (OLMoE), hot")
    late = measure_layer(TINY, "hot", names, CPU, Budget(-1))
    assert all(result == {"skipped": "no time was left"} for result in late.values())
