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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context
from typing import Any, Final

import numpy as np
import torch

from benchmarks.certificate import birth_certificate, write_result
from benchmarks.gpu_check import Check, checks, run_checks, warm_up
from benchmarks.gpu_contenders import Contender, contenders
from benchmarks.gpu_measure import Budget, Clock, measure_layer
from benchmarks.gpu_shapes import ROUTINGS, SHAPES, Shape
from benchmarks.gpu_stages import ceilings, measure_stages

# A shape is not begun with less.
_LEAST_SECONDS: Final = 15.0
_BASELINE: Final = "ours, fused"
_GROUPED: Final = "ours, grouped_mm"


def check_all(found: Sequence[Check], shapes: Sequence[Shape], workers: int) -> list[dict[str, Any]]:
    """Every check on the GPU, in several processes, since most of the time goes to compiling. Meanwhile they compile
    what `shapes` will need."""
    # Checks that differ in routing alone run the same kernels: one process compiles them, once.
    together: dict[Check, list[Check]] = {}
    for check in found:
        together.setdefault(replace(check, routing=""), []).append(check)
    tasks = [partial(warm_up, shape) for shape in shapes]
    tasks += [partial(run_checks, checks, "cuda") for checks in together.values()]
    results = _in_processes(tasks, workers)
    # The first one to fail so takes its process's GPU from those that come after, so each gets a process of its own.
    lost = [check for check in found if any(_lost_gpu(r) and r.items() >= asdict(check).items() for r in results)]
    redone = _in_processes([partial(run_checks, [check], "cuda") for check in lost], workers, 1) if lost else []
    return [result for result in results if not _lost_gpu(result)] + redone


def _lost_gpu(result: dict[str, Any]) -> bool:
    return "CUDA error" in result.get("error", "")


def _in_processes(
    tasks: Sequence[partial[list[dict[str, Any]]]], workers: int, tasks_of_each: int | None = None
) -> list[dict[str, Any]]:
    """What the tasks return, one after the other."""
    results = []
    with ProcessPoolExecutor(workers, get_context("spawn"), max_tasks_per_child=tasks_of_each) as pool:
        for task, future in [(task, pool.submit(task)) for task in tasks]:
            try:
                results += future.result()
            except Exception as error:  # a process that died
                results.append({"died": str(task), "passed": False, "error": f"{type(error).__name__}: {error}"})
    return results


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
    clock = Clock("cuda")
    found, results["missing"] = contenders()
    # Of what is timed. A process that died says nothing of what it checked, so nothing of ours is trusted.
    wrong = {_BASELINE if check["tiles"] else _GROUPED for check in failed if check.get("dtype") == "bfloat16"}
    wrong |= {_BASELINE, _GROUPED} if any("died" in check for check in failed) else set()
    results["missing"] |= dict.fromkeys(wrong, "wrong: see correctness")
    found = {name: contender for name, contender in found.items() if name not in wrong}
    results["ceilings"], results["stages"], results["layers"], results["not_measured"] = ceilings(clock), {}, {}, []
    copy, cublas = results["ceilings"]["copy"]["gb_per_s"], results["ceilings"]["cublas"]["tflops"]
    print(f"ceilings: copy {copy:.0f} GB/s, cuBLAS bfloat16 {cublas:.0f} TFLOP/s")
    if _BASELINE in found:
        for name in names:
            _try(f"stages of {name}", results, budget, partial(_stages, name, results, clock, copy))
            write_result(results["name"], certificate, results)
    for routing in ROUTINGS:
        for name in names:
            one = partial(_layer, name, routing, results, found, clock, budget)
            _try(f"{name}, {routing}", results, budget, one)
            write_result(results["name"], certificate, results)
    for note in results["not_measured"]:
        print(f"not measured: {note}")
    print(f"written to {write_result(results['name'], certificate, results).name}")


def _try(what: str, results: dict[str, Any], budget: Budget, call: Callable[[], None]) -> None:
    """One part that fails, as for want of memory, is noted, and the others go on."""
    if budget.left() < _LEAST_SECONDS:
        results["not_measured"].append(f"{what}: no time was left")
        return
    try:
        call()
    except Exception as error:
        results["not_measured"].append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
    torch.cuda.empty_cache()


def _stages(name: str, results: dict[str, Any], clock: Clock, copy: float) -> None:
    results["stages"][name] = stages = measure_stages(SHAPES[name], clock, copy)
    rates = (
        f"{stage} {rate['tflops']:.0f} TF/s" if "tflops" in rate else f"{stage} {rate['share_of_copy']:.0%} of copy"
        for stage, rate in stages.items()
    )
    print(f"{name:5}" + ", ".join(rates))


def _layer(
    name: str,
    routing: str,
    results: dict[str, Any],
    found: dict[str, Contender],
    clock: Clock,
    budget: Budget,
) -> None:
    layer = measure_layer(SHAPES[name], routing, found, clock, budget)
    results["layers"].setdefault(name, {})[routing] = layer
    print_layer(name, routing, layer)


def print_layer(name: str, routing: str, layer: dict[str, Any]) -> None:
    """Milliseconds with their spread, TFLOP/s, memory, and times against our fused kernels."""
    print(f"\n{name} ({SHAPES[name].model}), {routing}")
    header = f"{'forward ms (10..90 %)':>26} {'TF/s':>6} {'fwd + bwd ms (10..90 %)':>26} {'TF/s':>6} {'x ours':>7}"
    print(f"  {'':18}{header} {'peak GB':>8}")
    ours = layer.get(_BASELINE, {}).get("ms_forward_backward", {}).get("median")
    for contender, of in layer.items():
        if "skipped" in of:
            print(f"  {contender:18}{of['skipped'][:100]}")
            continue
        forward, both = (
            f"{ms['median']:.3f} ({ms['p10']:.3f}..{ms['p90']:.3f})"
            for ms in (of["ms_forward"], of["ms_forward_backward"])
        )
        times = f"{of['ms_forward_backward']['median'] / ours:.2f}" if ours else ""
        peak = "" if of["peak_bytes_saved"] is None else f"{of['peak_bytes_saved'] / 1e9:.2f}"
        tflops = of["tflops"]
        line = f"{forward:>26} {tflops['forward']:6.0f} {both:>26} {tflops['forward_backward']:6.0f} {times:>7}"
        print(f"  {contender:18}{line} {peak:>8}")


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
    results["correctness"] = check_all(checks(tiny=False), [SHAPES[name] for name in names], given.workers)
    failed = print_checks(results["correctness"])
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
