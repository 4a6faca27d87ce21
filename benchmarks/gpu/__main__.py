"""The MoE layer on one GPU: is it right, how fast are its kernels, and how fast is a layer beside others' ways.

python -m benchmarks.gpu

Without a GPU, the first question alone, on small sizes, under Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import numpy as np
import torch

from benchmarks.common.provenance import birth_certificate, write_result
from benchmarks.gpu.check import Check, checks, run_checks, warm_up
from benchmarks.gpu.measure import Budget
from benchmarks.gpu.processes import LATE, listen, results_of
from benchmarks.gpu.shapes import ROUTINGS, SHAPES, Shape
from benchmarks.gpu.worker import Part, work

_BASELINE: Final = "ours, fused"
_GROUPED: Final = "ours, grouped_mm"
# Of the time, for checks and for compiling what will be timed.
_CHECKS_SHARE: Final = 0.45
# A contender that does nothing that can be seen for so long, as in a kernel that never ends, is given up.
_SILENT_SECONDS: Final = 100.0
# Package -> whose kernels, compiled in one process, another finds in a cache on disk. SonicMoE's are for all shapes.
_COMPILED: Final = {
    "liger_kernel": ("Liger",),
    "scattermoe": ("ScatterMoE",),
    "sonicmoe": ("SonicMoE",),
    "swiftmoe_lightning": (_BASELINE, _GROUPED),
}


def check_all(
    found: Sequence[Check], shapes: Sequence[Shape], workers: int, seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """(every check on the GPU, notes), in many processes, since most of the time goes to compiling. Meanwhile others
    compile what `shapes` will need."""
    # Checks that differ in routing alone run the same kernels: one process compiles them, once.
    together: dict[Check, list[Check]] = {}
    for check in found:
        together.setdefault(replace(check, routing=""), []).append(check)
    here = [names for package, names in _COMPILED.items() if find_spec(package) is not None]
    compiled = [(shape, names) for names in here for shape in (shapes[:1] if names == ("SonicMoE",) else shapes)]
    budget = Budget(seconds)
    tasks: list[Callable[[], Any]] = [partial(warm_up, shape, names) for shape, names in compiled]
    tasks += [partial(run_checks, group, "cuda") for group in together.values()]
    answers = results_of(tasks, workers, seconds)
    notes = [
        f"{' and '.join(names)} for {shape.model}, compiled ahead: {reason}"
        for (shape, names), (_, reason) in zip(compiled, answers, strict=False)
        if reason is not None
    ]
    results, again = [], []
    for group, (answer, _) in zip(together.values(), answers[len(compiled) :], strict=True):
        # The first one to fail so takes the GPU, or the process, from those that come after.
        again += group if answer is None else [c for c, of in zip(group, answer, strict=True) if of.get("lost_gpu")]
        results += [] if answer is None else [of for of in answer if not of.get("lost_gpu")]
    redone = results_of([partial(run_checks, [check], "cuda") for check in again], workers, budget.left())
    for check, (answer, reason) in zip(again, redone, strict=True):
        results += answer or [asdict(check) | {"passed": False, "error": reason}]
    return results, notes


def print_checks(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line, and one for each that failed. Returns those."""
    failed = [result for result in results if not result["passed"]]
    print(f"correctness: {len(results) - len(failed)} of {len(results)} checks passed")
    for result in failed:
        print(f"  WRONG {result}")
    return failed


def measure(
    names: Sequence[str],
    results: dict[str, Any],
    failed: Sequence[dict[str, Any]],
    certificate: dict[str, Any],
    budget: Budget,
) -> None:
    """Fill `results` on the GPU, and write them as they come: a run may be cut off. What failed is not timed."""
    # Of what is timed.
    wrong = {_BASELINE if check["tiles"] else _GROUPED for check in failed if check["dtype"] == "bfloat16"}
    results["missing"] = dict.fromkeys(sorted(wrong), "wrong: see correctness")
    results |= {"ceilings": {}, "stages": {}, "layers": {}}
    parts = [Part("ceilings")]
    if _BASELINE not in wrong:
        parts += [Part("stages", name) for name in names]
    parts += [Part("layer", name, routing) for routing in ROUTINGS for name in names]
    while parts:
        at: list[Any] = [None, ""]
        reason = listen(
            partial(work, tuple(parts), tuple(results["missing"]), _copy_of(results), budget.left()),
            max(budget.left(), 0.0),
            _SILENT_SECONDS,
            partial(_hear, at, parts, results, certificate),
        )
        if reason is None or reason == LATE or at[0] is None:
            results["not_measured"] += [f"{part}: {reason or 'nothing was said of it'}" for part in parts]
            break
        # A process was lost: the next one goes on without whoever ran in it, or without the part where that was nobody.
        if at[1]:
            results["missing"][at[1]] = f"{at[0]}: {reason}"
        else:
            parts.remove(at[0])
            results["not_measured"].append(f"{at[0]}: {reason}")
    for note in results["not_measured"]:
        print(f"not measured: {note}")
    for name, reason in results["missing"].items():
        print(f"missing: {name}: {reason}")
    print(f"written to {write_result(results['name'], certificate, results).name}")


def _copy_of(results: dict[str, Any]) -> float | None:
    return results["ceilings"]["copy"]["gb_per_s"] if results["ceilings"] else None


def _hear(
    at: list[Any], parts: list[Part], results: dict[str, Any], certificate: dict[str, Any], message: tuple[Any, ...]
) -> None:
    """at: [part, contender] that the worker is at. parts: those that are left. Both are kept up to date."""
    kind, *said = message
    if kind == "missing":
        results["missing"] = said[0] | results["missing"]
        return
    if kind == "begins":
        at[:] = said
        return
    part, what = said
    parts.remove(part)
    if kind == "failed":
        results["not_measured"].append(f"{part}: {what}")
    else:
        _keep(part, what, results)
    write_result(results["name"], certificate, results)


def _keep(part: Part, what: dict[str, Any], results: dict[str, Any]) -> None:
    if part.kind == "ceilings":
        results["ceilings"] = what
        copy, cublas = what["copy"]["gb_per_s"], what["cublas"]["tflops"]
        print(f"ceilings: copy {copy:.0f} GB/s, cuBLAS bfloat16 {cublas:.0f} TFLOP/s", flush=True)
    elif part.kind == "stages":
        results["stages"][part.shape], copy = what, _copy_of(results) or float("nan")
        rates = (
            f"{stage} {rate['tflops']:.0f} TF/s"
            if "tflops" in rate
            else f"{stage} {rate['gb_per_s'] / copy:.0%} of copy"
            for stage, rate in what.items()
        )
        print(f"{part.shape:5}" + ", ".join(rates), flush=True)
    else:
        results["layers"].setdefault(part.shape, {})[part.routing] = what
        print_layer(part.shape, part.routing, what)


def print_layer(name: str, routing: str, layer: dict[str, Any]) -> None:
    """Milliseconds with their spread, TFLOP/s, memory, and times against our fused kernels."""
    print(f"\n{name} ({SHAPES[name].model}), {routing}")
    header = f"{'forward ms (10..90 %)':>26} {'TF/s':>6} {'fwd + bwd ms (10..90 %)':>26} {'TF/s':>6} {'x ours':>7}"
    print(f"  {'':18}{header} {'saved GB':>8} {'peak GB':>8}", flush=True)
    ours = layer.get(_BASELINE, {}).get("ms_forward_backward", {}).get("median")
    for contender, of in layer.items():
        if "skipped" in of:
            worst = f" (error {max(of['errors'].values()):.1e})" if "errors" in of else ""
            print(f"  {contender:18}{of['skipped'][:100]}{worst}")
            continue
        forward, both = (
            f"{ms['median']:.3f} ({ms['p10']:.3f}..{ms['p90']:.3f})"
            for ms in (of["ms_forward"], of["ms_forward_backward"])
        )
        times = f"{of['ms_forward_backward']['median'] / ours:.2f}" if ours else ""
        saved, peak = ("" if of[k] is None else f"{of[k] / 1e9:.2f}" for k in ("bytes_saved", "peak_bytes"))
        tflops = of["tflops"]
        line = f"{forward:>26} {tflops['forward']:6.0f} {both:>26} {tflops['forward_backward']:6.0f} {times:>7}"
        print(f"  {contender:18}{line} {saved:>8} {peak:>8}")


def main(words: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 when something is wrong, that is, not right; slow is not wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="gpu", help="of the result file")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="with commas between, in the order to measure")
    parser.add_argument("--seconds", type=float, default=450, help="for everything; what does not fit is left out")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that check")
    given = parser.parse_args(words)
    names = given.shapes.split(",")
    if unknown := set(names) - SHAPES.keys():
        parser.error(f"--shapes must be some of {', '.join(SHAPES)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        return check_without_a_gpu()
    budget, certificate = Budget(given.seconds), birth_certificate()
    results: dict[str, Any] = {"name": given.name, "shapes": {name: vars(SHAPES[name]) for name in names}}
    shapes = [SHAPES[name] for name in names]
    seconds = _CHECKS_SHARE * given.seconds
    results["correctness"], results["not_measured"] = check_all(checks(tiny=False), shapes, given.workers, seconds)
    failed = print_checks(results["correctness"])
    write_result(given.name, certificate, results)
    measure(names, results, failed, certificate, budget)
    return 1 if failed else 0


def check_without_a_gpu() -> int:
    """The checks on small sizes; nothing is timed or written."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it while it is imported, which has happened.
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, "-m", "benchmarks.gpu"], env=environment).returncode
    print("No GPU: kernels run under Triton's interpreter on small sizes, and nothing is timed.")
    with np.errstate(all="ignore"):
        results = run_checks(checks(tiny=True), "cpu")
    return 1 if print_checks(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
