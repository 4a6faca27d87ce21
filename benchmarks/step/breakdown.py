"""Where our step's time goes: phases by their named ranges, what of it is control and exposed weights, and a trace.

W ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.across_ranks import least
from benchmarks.common.files import written_whole
from benchmarks.common.interleaved import seconds_of
from benchmarks.common.phases import named_phases
from benchmarks.common.spread import median_of, spread
from benchmarks.step.training import TrainingSystem

# phase -> seconds of each time that it ran in one step of one rank.
Spans = Mapping[str, Sequence[float]]
_CONTROL: Final = ("plan", "place")
_WEIGHT_PHASES: Final = ("collect", "distribute")
_COUNT: Final = "count"
_TRACED_STEPS: Final = 2


def spans_of_steps(system: TrainingSystem, steps: int) -> list[list[Spans]]:
    """[steps][W]: what each step spent in which phase, on every rank. What has no name is "other". A collective.

    Steps follow each other as in training: nothing is waited for between them.
    """
    mine = []
    for _ in range(steps):
        with named_phases() as watch, watch.phase("other"):
            system.step()
        mine.append(dict(watch.spans))
    system.wait_for_weights()
    by_rank: list[list[Spans]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, mine)
    return [list(step) for step in zip(*by_rank, strict=True)]


def phases_ms(steps: Sequence[Sequence[Spans]]) -> dict[str, dict[str, float]]:
    """Phase -> milliseconds of a step, the mean over ranks, with its spread over steps.

    Args:
        steps: what `spans_of_steps` returned.
    """
    names = sorted({name for step in steps for spans in step for name in spans})
    return {
        name: spread([1e3 * float(np.mean([sum(spans.get(name, ())) for spans in step])) for step in steps])
        for name in names
    }


def weight_phases_fraction(steps: Sequence[Sequence[Spans]]) -> dict[str, Any] | None:
    """Share of a step in which the training thread packs, sums, fills or waits for weights and their gradients; None
    where those phases have no names.

    Args:
        steps: what `spans_of_steps` returned.
    """
    return _fraction(steps, _WEIGHT_PHASES, lambda step: _seconds(step, _WEIGHT_PHASES))


def control_fraction(steps: Sequence[Sequence[Spans]], split_seconds: float) -> dict[str, Any] | None:
    """Share of a step for what adapting adds to expert parallelism: plan, place, and what the exchange of counts takes
    beyond that of split sizes, which all-to-all of tokens needs in any case; None where those phases have no names.

    In each exchange of counts the last rank to come waits for nobody, so the least of the ranks' times counts.

    Args:
        steps: what `spans_of_steps` returned.
        split_seconds: of the exchanges of split sizes that a step needs, alone.
    """

    def seconds(step: Sequence[Spans]) -> float:
        count_seconds = sum(min(count_W) for count_W in zip(*(spans[_COUNT] for spans in step), strict=True))
        return _seconds(step, _CONTROL) + max(count_seconds - split_seconds, 0.0)

    return _fraction(steps, (*_CONTROL, _COUNT), seconds)


def _fraction(steps: Sequence[Sequence[Spans]], needed: Sequence[str], seconds: Any) -> dict[str, Any] | None:
    if not all(name in spans for step in steps for spans in step for name in needed):
        return None
    return median_of([seconds(step) / _seconds(step) for step in steps])


def _seconds(step: Sequence[Spans], names: Sequence[str] | None = None) -> float:
    """Seconds of these phases, or of all, in one step; the mean over ranks."""
    return float(np.mean([sum(sum(spans[name]) for name in names or spans) for spans in step]))


def split_exchange_seconds(num_experts: int, repeats: int) -> float:
    """Median seconds in which ranks tell each other how many tokens of each expert they send: one all-to-all of E
    numbers, read on the host, as in static expert parallelism. A collective.

    Args:
        num_experts: E, a multiple of W.
        repeats: exchanges.
    """
    counts_E = torch.ones(num_experts, dtype=torch.int64)
    received_E = torch.empty_like(counts_E)

    def exchange() -> list[int]:
        dist.all_to_all_single(received_E, counts_E)
        return received_E.tolist()

    times = []
    for _ in range(repeats):
        dist.barrier()
        times.append(seconds_of(exchange))
    return float(np.median(least(times)))


def write_chrome_trace(system: TrainingSystem, path: Path) -> None:
    """Two steps of rank 0 as torch's profiler sees them, for chrome://tracing or Perfetto. A collective.

    Args:
        system: in training.
        path: a JSON file; its folder is made.
    """
    if dist.get_rank():
        _traced_steps(system)
        return
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _traced_steps(system)
    with written_whole(path) as unfinished:
        profiler.export_chrome_trace(str(unfinished))


def _traced_steps(system: TrainingSystem) -> None:
    for _ in range(_TRACED_STEPS):
        system.step()
    system.wait_for_weights()
