"""The MoE layer on one GPU in bfloat16: its errors, the speed of its kernels, and its speed beside others.

correctness  every tile configuration that ships against float64: norm of the error over the norm of the result
ceilings     GB/s of a copy, TFLOP/s of cuBLAS
stages       each kernel alone: its share of the copy's GB/s, or TFLOP/s
layers       by shape, routing and implementation: milliseconds of forward and of forward with backward, TFLOP/s,
             bytes. "x ours" is another's milliseconds over our fused kernels': above 1 we are faster

Writes benchmarks/results/NAME.json after every part, and prints a table. Without a GPU it checks correctness alone, on
small sizes, under Triton's interpreter, and writes nothing. Ends with 1 where something is wrong; slow is not wrong.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.gpu.check import checks, run_checks
from benchmarks.gpu.measure import Budget
from benchmarks.gpu.report import print_checks
from benchmarks.gpu.run import TimedRun, check_all
from benchmarks.gpu.shapes import SHAPES

# Share of the time for checks and for compiling what will be timed.
_CHECKS_SHARE: Final = 0.45


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns 1 when something is wrong."""
    parser = command_line("gpu", __doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="with commas between, in the order to measure")
    parser.add_argument("--seconds", type=float, default=450, help="for everything; what does not fit is left out")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes that check")
    arguments = parser.parse_args(argv)
    names = arguments.shapes.split(",")
    if unknown := set(names) - SHAPES.keys():
        parser.error(f"--shapes must be some of {', '.join(SHAPES)}, got {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        return check_without_a_gpu()
    budget, provenance = Budget(arguments.seconds), collect_provenance()
    results: dict[str, Any] = {"name": arguments.name, "shapes": {name: vars(SHAPES[name]) for name in names}}
    results["correctness"], results["not_measured"] = check_all(
        checks(tiny=False), [SHAPES[name] for name in names], arguments.workers, _CHECKS_SHARE * arguments.seconds
    )
    failed = print_checks(results["correctness"])
    write_result(arguments.name, provenance, results)
    TimedRun(names, failed, results, provenance).measure(budget)
    for note in results["not_measured"]:
        print(f"not measured: {note}")
    for name, reason in results["missing"].items():
        print(f"missing: {name}: {reason}")
    print(f"written to {write_result(arguments.name, provenance, results)}")
    return 1 if failed else 0


def check_without_a_gpu() -> int:
    """The checks on small sizes; nothing is timed or written."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads the variable when it is imported, so a new process has to start with it.
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        return subprocess.run([sys.executable, "-m", "benchmarks.gpu"], env=environment).returncode
    print("No GPU: kernels run under Triton's interpreter on small sizes, and nothing is timed.")
    with np.errstate(all="ignore"):
        results = run_checks(checks(tiny=True), "cpu")
    return 1 if print_checks(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
