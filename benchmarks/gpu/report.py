"""The GPU benchmark's results as lines on the terminal, printed as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.candidates import OURS_FUSED
from benchmarks.gpu.shapes import SHAPES


def print_checks(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line, and one for each that failed. Returns those."""
    failed = [result for result in results if not result["passed"]]
    print(f"correctness: {len(results) - len(failed)} of {len(results)} checks passed")
    for result in failed:
        print(f"  WRONG {result}")
    return failed


def print_ceilings(ceilings: dict[str, Any]) -> None:
    """One line."""
    copy, cublas = ceilings["copy"]["gb_per_s"], ceilings["cublas"]["tflops"]
    print(f"ceilings: copy {copy:.0f} GB/s, cuBLAS bfloat16 {cublas:.0f} TFLOP/s", flush=True)


def print_stages(shape: str, stages: dict[str, Any], copy_gb_per_s: float) -> None:
    """One line: TFLOP/s of products, and the share of the copy's rate of what moves memory."""
    rates = (
        f"{stage} {rate['tflops']:.0f} TF/s"
        if "tflops" in rate
        else f"{stage} {rate['gb_per_s'] / copy_gb_per_s:.0%} of copy"
        for stage, rate in stages.items()
    )
    print(f"{shape:5}" + ", ".join(rates), flush=True)


def print_layer(name: str, routing: str, layer: dict[str, Any]) -> None:
    """Milliseconds with their spread, TFLOP/s, memory, and times against our fused kernels."""
    print(f"\n{name} ({SHAPES[name].model}), {routing}")
    header = f"{'forward ms (10..90 %)':>26} {'TF/s':>6} {'fwd + bwd ms (10..90 %)':>26} {'TF/s':>6} {'x ours':>7}"
    print(f"  {'':18}{header} {'saved GB':>8} {'peak GB':>8}", flush=True)
    ours = layer.get(OURS_FUSED, {}).get("ms_forward_backward", {}).get("median")
    for candidate, results in layer.items():
        if "skipped" in results:
            worst = f" (error {max(results['errors'].values()):.1e})" if "errors" in results else ""
            print(f"  {candidate:18}{results['skipped'][:100]}{worst}")
            continue
        forward, both = (
            f"{ms['median']:.3f} ({ms['p10']:.3f}..{ms['p90']:.3f})"
            for ms in (results["ms_forward"], results["ms_forward_backward"])
        )
        times = f"{results['ms_forward_backward']['median'] / ours:.2f}" if ours else ""
        saved, peak = ("" if results[k] is None else f"{results[k] / 1e9:.2f}" for k in ("bytes_saved", "peak_bytes"))
        tflops = results["tflops"]
        line = f"{forward:>26} {tflops['forward']:6.0f} {both:>26} {tflops['forward_backward']:6.0f} {times:>7}"
        print(f"  {candidate:18}{line} {saved:>8} {peak:>8}")
