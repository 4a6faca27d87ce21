"""What the benchmark measures on every rank: times of both implementations alternately, memory of each alone."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from benchmarks.common.across_ranks import slowest
from benchmarks.common.command_line import setting
from benchmarks.common.interleaved import interleaved, seconds_of
from benchmarks.common.spread import paired_ratio, spread
from benchmarks.huggingface_ep.workload import TrainingLoop

OURS: Final = "swiftmoe"
THEIRS: Final = "all_to_all"
_WARM_UP: Final = 2


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many measurements to make, on how many ranks."""

    ranks: int = setting(4, "gloo processes")
    ep_size: int = setting(4, "ranks of an expert group")
    pairs: int = setting(10, "measured, two blocks of each")
    steps: int = setting(2, "in a block")


def measure_times(folder: str, routing: str, effort: Effort) -> dict[str, Any]:
    """Step times of both, and the ratio of neighbours. Every rank calls it; rank 0's is the result."""
    ours, theirs = (TrainingLoop(folder, kind, routing, effort.ep_size) for kind in (OURS, THEIRS))
    our_seconds, their_seconds = interleaved(
        lambda: seconds_of(lambda: ours.run(effort.steps)),
        lambda: seconds_of(lambda: theirs.run(effort.steps)),
        effort.pairs,
        _WARM_UP,
    )
    our_seconds, their_seconds = slowest(our_seconds), slowest(their_seconds)
    return {
        "ratio": paired_ratio(our_seconds, their_seconds),
        "step_ms": {
            kind: spread(1e3 * np.array(seconds) / effort.steps)
            for kind, seconds in ((OURS, our_seconds), (THEIRS, their_seconds))
        },
    }


def measure_memory(folder: str, implementation: str, routing: str, effort: Effort) -> float:
    """The most MiB that a rank's process has held, from its start through a few steps. Every rank calls it."""
    TrainingLoop(folder, implementation, routing, effort.ep_size).run(_WARM_UP + effort.steps)
    (kibibytes,) = slowest([float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)])
    return kibibytes / 1024
