"""The timed part of the GPU benchmark, as a process of its own that says what it does and what it finds."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.gpu.check import lost_gpu
from benchmarks.gpu.measure import Budget, Clock, measure_layer
from benchmarks.gpu.peers import contenders
from benchmarks.gpu.processes import LATE, Say
from benchmarks.gpu.shapes import SHAPES, Shape
from benchmarks.gpu.stages import ceilings, measure_stages

# A part is not begun with less.
_LEAST_SECONDS: Final = 15.0


@dataclass(frozen=True)
class Part:
    """kind: "ceilings", "stages" of a shape, or a "layer", which has a routing, too."""

    kind: str
    shape: str = ""
    routing: str = ""

    def __str__(self) -> str:
        return f"{self.shape}, {self.routing}" if self.routing else f"{self.kind} of {self.shape or 'the GPU'}"


def work(parts: Sequence[Part], left_out: Collection[str], copy: float | None, seconds: float, say: Say) -> None:
    """Measure part after part, and say ("missing", {contender: why}), ("begins", part, contender or ""),
    ("found", part, what), ("failed", part, why).

    left_out: contenders not to run. copy: GB/s of the ceilings, if they are known already.
    A part that fails, as for want of memory, is said to, and the others go on; with the GPU lost, nothing does.
    """
    budget, clock = Budget(seconds), Clock("cuda")
    found, missing = contenders()
    found = {name: contender for name, contender in found.items() if name not in left_out}
    say(("missing", missing))
    for part in parts:
        if budget.left() < _LEAST_SECONDS:
            say(("failed", part, LATE))
            continue
        say(("begins", part, ""))
        try:
            if part.kind == "ceilings":
                what: dict[str, Any] = ceilings(clock)
                copy = what["copy"]["gb_per_s"]
            elif part.kind == "stages":
                what = measure_stages(_shape(part), clock, copy)
            else:

                def begin(contender: str, part: Part = part) -> None:
                    say(("begins", part, contender))

                what = measure_layer(_shape(part), part.routing, found, clock, budget, begin)
        except Exception as error:
            if lost_gpu(clock.device):
                raise
            say(("failed", part, f"{type(error).__name__}: {str(error)[:300]}"))
        else:
            say(("found", part, what))
        if clock.device != "cpu":
            torch.cuda.empty_cache()


def _shape(part: Part) -> Shape:
    return SHAPES[part.shape]
