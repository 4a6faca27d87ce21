"""A run on a GPU: checks in many processes, then everything that is timed in one, and results kept as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

from benchmarks.common.provenance import write_result
from benchmarks.gpu.candidates import OURS_FUSED, OURS_GROUPED
from benchmarks.gpu.check import Check, run_checks, warm_up
from benchmarks.gpu.measure import Budget
from benchmarks.gpu.processes import LATE, listen, results_of
from benchmarks.gpu.report import print_ceilings, print_layer, print_stages
from benchmarks.gpu.shapes import ROUTINGS, Shape
from benchmarks.gpu.worker import Part, work

# A candidate that reports nothing for so long (a kernel may never end) is given up.
_SILENT_SECONDS: Final = 100.0
# Packages whose kernels, compiled in one process, another reads from a cache on disk. SonicMoE's are for all shapes.
_COMPILED: Final = {
    "liger_kernel": ("Liger",),
    "scattermoe": ("ScatterMoE",),
    "sonicmoe": ("SonicMoE",),
    "swiftmoe_lightning": (OURS_FUSED, OURS_GROUPED),
}


def check_all(
    every: Sequence[Check], shapes: Sequence[Shape], workers: int, seconds: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run checks on the GPU in many processes, since most of the time goes to compiling. Meanwhile others compile what
    `shapes` will need.

    Returns:
        (the result of each check, notes about what was not compiled ahead).
    """
    # Checks that differ in routing alone run the same kernels: one process compiles them, once.
    together: dict[Check, list[Check]] = {}
    for check in every:
        together.setdefault(replace(check, routing=""), []).append(check)
    installed = [names for package, names in _COMPILED.items() if find_spec(package) is not None]
    compiled = [(shape, names) for names in installed for shape in (shapes[:1] if names == ("SonicMoE",) else shapes)]
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
        # The first such failure takes the GPU, or the process, from the checks that come after it.
        if answer is None:
            again += group
            continue
        again += [check for check, result in zip(group, answer, strict=True) if result.get("lost_gpu")]
        results += [result for result in answer if not result.get("lost_gpu")]
    redone = results_of([partial(run_checks, [check], "cuda") for check in again], workers, budget.left())
    for check, (answer, reason) in zip(again, redone, strict=True):
        results += answer or [asdict(check) | {"passed": False, "error": reason}]
    return results, notes


class TimedRun:
    """The timed parts, one after the other, in a worker process. If that dies, another goes on without the candidate
    that ran in it."""

    def __init__(
        self,
        shapes: Sequence[str],
        failed: Sequence[dict[str, Any]],
        results: dict[str, Any],
        provenance: dict[str, Any],
    ) -> None:
        """Begin with nothing measured.

        Args:
            shapes: names, in the order to measure.
            failed: checks that are wrong: what they are about is not timed.
            results: with "name" and "not_measured". Filled, and written after every part, since a run may be cut off.
            provenance: of `collect_provenance`, written with the results.
        """
        self.results, self.provenance = results, provenance
        wrong = {OURS_FUSED if check["tiles"] else OURS_GROUPED for check in failed if check["dtype"] == "bfloat16"}
        results["missing"] = dict.fromkeys(sorted(wrong), "wrong: see correctness")
        results |= {"ceilings": {}, "stages": {}, "layers": {}}
        self.parts = [Part("ceilings")]
        if OURS_FUSED not in wrong:
            self.parts += [Part("stages", name) for name in shapes]
        self.parts += [Part("layer", name, routing) for routing in ROUTINGS for name in shapes]
        self.running: tuple[Part | None, str] = (None, "")

    def measure(self, budget: Budget) -> None:
        """All parts, as far as the time goes."""
        while self.parts:
            self.running = (None, "")
            task = partial(
                work, tuple(self.parts), tuple(self.results["missing"]), self._copy_gb_per_s(), budget.left()
            )
            reason = listen(task, max(budget.left(), 0.0), _SILENT_SECONDS, self._receive)
            part, candidate = self.running
            if reason is None or reason == LATE or part is None:
                self.results["not_measured"] += [f"{part}: {reason or 'nothing was sent of it'}" for part in self.parts]
                return
            if candidate:
                self.results["missing"][candidate] = f"{part}: {reason}"
            else:
                self.parts.remove(part)
                self.results["not_measured"].append(f"{part}: {reason}")

    def _copy_gb_per_s(self) -> float | None:
        ceilings = self.results["ceilings"]
        return ceilings["copy"]["gb_per_s"] if ceilings else None

    def _receive(self, message: tuple[Any, ...]) -> None:
        """What `work` sends."""
        match message:
            case "missing", missing:
                self.results["missing"] = missing | self.results["missing"]
            case "begins", part, candidate:
                self.running = (part, candidate)
            case "failed", part, reason:
                self.results["not_measured"].append(f"{part}: {reason}")
                self._end(part)
            case "measured", part, measured:
                self._keep(part, measured)
                self._end(part)

    def _end(self, part: Part) -> None:
        self.parts.remove(part)
        write_result(self.results["name"], self.provenance, self.results)

    def _keep(self, part: Part, measured: dict[str, Any]) -> None:
        if part.kind == "ceilings":
            self.results["ceilings"] = measured
            print_ceilings(measured)
        elif part.kind == "stages":
            self.results["stages"][part.shape] = measured
            print_stages(part.shape, measured, self._copy_gb_per_s() or float("nan"))
        else:
            self.results["layers"].setdefault(part.shape, {})[part.routing] = measured
            print_layer(part.shape, part.routing, measured)
