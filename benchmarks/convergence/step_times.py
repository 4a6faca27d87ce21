"""Step times of the systems on real ranks, each with its own loads, placements and phases, as ratios to static's.

python -m benchmarks.convergence.step_times

Every rank has a core of its own where there are as many. Systems take turns, so that a busy machine is busy for all.
With a capacity all do about the same work; without one the busiest rank sets the pace, and static's is the busiest.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.common.across_ranks import slowest
from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.common.spread import spread
from benchmarks.convergence.corpus import load_corpus
from benchmarks.convergence.real_ranks import train_on_ranks
from benchmarks.convergence.settings import Setting
from tests.helpers import run_ranks

# A run's first steps find their memory and threads.
_WARM_UP_STEPS: Final = 10
_WITH_CAPACITY: Final = ("static", "flexmoe-50", "flexmoe-10", "symi", "packed", "balanced")
_DROPLESS: Final = ("static", "symi", "balanced")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        setting: of every run.
        rounds: runs of each system, each from its own seed.
        cache: of the corpus.
    """

    setting: Setting
    rounds: int
    cache: Path


def measure(plan: Plan, systems: tuple[str, ...]) -> dict[str, Any]:
    """On each rank: every system's step times and largest loads, and both over static's. A collective."""
    _pin(torch.distributed.get_rank())
    corpus = load_corpus(plan.setting.corpus, plan.cache)
    seconds: dict[str, list[float]] = {system: [] for system in systems}
    loads: dict[str, list[float]] = {system: [] for system in systems}
    for seed in range(plan.rounds):
        for system in systems:
            run = train_on_ranks(plan.setting, system, seed, corpus)
            seconds[system].append(float(np.mean(slowest(run.seconds)[_WARM_UP_STEPS:])))
            loads[system].append(float(np.mean(run.largest_load[_WARM_UP_STEPS:])))
    return {
        "step_ms": {system: spread(1e3 * np.array(values)) for system, values in seconds.items()},
        "step_time_over_static": {
            system: spread(np.array(values) / np.array(seconds["static"])) for system, values in seconds.items()
        },
        "largest_load_over_static": {
            system: spread(np.array(values) / np.array(loads["static"])) for system, values in loads.items()
        },
    }


def _pin(rank: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("convergence.step_times", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each system")
    parser.add_argument("--sequences", type=int, default=16, help="of a step, all ranks: with more, experts weigh more")
    parser.add_argument("--only-dropless", action="store_true", help="leave out the runs with a capacity")
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="for the corpus")
    given = parser.parse_args(arguments)
    provenance, cache = collect_provenance(), given.folder / "corpus"
    base = Setting()
    setting = replace(
        base,
        num_ranks=given.ranks,
        slots_per_rank=base.num_ranks * base.slots_per_rank // given.ranks,
        sequences_per_rank=given.sequences // given.ranks,
        num_steps=given.steps,
    )
    load_corpus(setting.corpus, cache)
    plans = {"dropless": (None, _DROPLESS)}
    if not given.only_dropless:
        plans = {"capacity 1": (1.0, _WITH_CAPACITY), **plans}
    results = {}
    for name, (factor, systems) in plans.items():
        plan = Plan(setting=replace(setting, capacity_factor=factor), rounds=given.rounds, cache=cache)
        measured = run_ranks(measure, given.ranks, plan, systems, timeout_s=3600)[0]
        for system, ratio in measured["step_time_over_static"].items():
            load = measured["largest_load_over_static"][system]["median"]
            print(f"{name:10} {system:12} step {ratio['median']:.3f} of static's, largest load {load:.3f}")
        results[name] = measured
    write_result(given.name, provenance, {"setting": asdict(setting), "expert_share": setting.expert_share, **results})


if __name__ == "__main__":
    main()
