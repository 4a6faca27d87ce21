"""The timed part of the GPU benchmark, in a process of its own that sends what it begins and what it measured."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.gpu.candidates import candidates
from benchmarks.gpu.check import lost_gpu
from benchmarks.gpu.measure import Budget, Clock, measure_layer
from benchmarks.gpu.processes import LATE, Send
from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.stages import ceilings, measure_stages

# With less time left, no part is begun.
_LEAST_SECONDS: Final = 15.0


@dataclass(frozen=True)
class Part:
    """What is measured in one piece.

    Attributes:
        kind: "ceilings", "stages" of a shape, or a "layer".
        shape: a name in SHAPES.
        routing: a layer's.
    """

    kind: str
    shape: str = ""
    routing: str = ""

    def __str__(self) -> str:
        return f"{self.shape}, {self.routing}" if self.routing else f"{self.kind} of {self.shape or 'the GPU'}"


def work(parts: Sequence[Part], left_out: Collection[str], copy: float | None, seconds: float, send: Send) -> None:
    """Measure part after part, and send ("missing", {candidate: why}), ("begins", part, candidate or ""),
    ("measured", part, results), ("failed", part, why).

    A part that fails, for one out of memory, is sent as failed, and the others go on, unless the GPU is lost.

    Args:
        left_out: candidates not to run.
        copy: GB/s of the ceilings, if they are known already.
    """
    budget, clock = Budget(seconds), Clock("cuda")
    installed, missing = candidates()
    installed = {name: candidate for name, candidate in installed.items() if name not in left_out}
    send(("missing", missing))
    for part in parts:
        if budget.left() < _LEAST_SECONDS:
            send(("failed", part, LATE))
            continue
        send(("begins", part, ""))
        try:
            if part.kind == "ceilings":
                results: dict[str, Any] = ceilings(clock)
                copy = results["copy"]["gb_per_s"]
            elif part.kind == "stages":
                results = measure_stages(SHAPES[part.shape], clock, copy)
            else:

                def begin(candidate: str, part: Part = part) -> None:
                    send(("begins", part, candidate))

                shape = SHAPES[part.shape]
                results = measure_layer(shape, part.routing, installed, clock, budget, begin)
        except Exception as error:
            if lost_gpu(clock.device):
                raise
            send(("failed", part, f"{type(error).__name__}: {str(error)[:300]}"))
        else:
            send(("measured", part, results))
        if clock.device != "cpu":
            torch.cuda.empty_cache()
