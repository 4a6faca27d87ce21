"""Step times of the systems on real ranks, each with its own loads, placements and phases, as ratios to static's.

python -m benchmarks.convergence.step_times                # ranks talk as fast as the machine lets them
python -m benchmarks.convergence.step_times --mbit 1000    # each behind a link of 1 Gbit/s; Linux, root, iproute2

Every rank has a core of its own where there are as many. Systems take turns, so that a busy machine is busy for all.
With a capacity all do about the same work; without one the busiest rank sets the pace, and static's is the busiest.

Writes benchmarks/results/NAME.json, with --mbit NAME_<mbit>mbit.json: ratios, and milliseconds of steps and phases.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch.distributed as dist

from benchmarks.common.across_ranks import pin_to_core, slowest, total
from benchmarks.common.command_line import command_line
from benchmarks.common.links import Links, missing_for_links, shaped
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.common.spread import spread
from benchmarks.convergence.corpus import load_corpus
from benchmarks.convergence.real_ranks import PHASES, RankRun, train_on_ranks
from benchmarks.convergence.settings import Setting
from tests.helpers import run_ranks

# A run's first steps find their memory and threads.
_WARM_UP_STEPS: Final = 10
_TIMEOUT_S: Final = 3600
_WITH_CAPACITY: Final = ("static", "flexmoe-50", "flexmoe-10", "symi", "packed", "balanced")
_DROPLESS: Final = ("static", "symi", "balanced")


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        setting: of every run.
        rounds: runs of each system, each from its own seed.
        cache: of the corpus.
        links: between the ranks, made before; None is the machine's own loopback.
    """

    setting: Setting
    rounds: int
    cache: Path
    links: Links | None


def measure(plan: Plan, systems: tuple[str, ...]) -> dict[str, Any]:
    """On each rank: every system's step times, phases and largest loads, and ratios to static's. A collective."""
    if plan.links is not None:
        plan.links.join(int(os.environ["RANK"]), _TIMEOUT_S)
    pin_to_core()
    corpus = load_corpus(plan.setting.corpus, plan.cache)
    runs: dict[str, list[RankRun]] = {system: [] for system in systems}
    for seed in range(plan.rounds):
        for system in systems:
            runs[system].append(train_on_ranks(plan.setting, system, seed, corpus))
    seconds = {system: np.array([_step_seconds(run) for run in of]) for system, of in runs.items()}
    loads = {
        system: np.array([np.mean(run.largest_load[_WARM_UP_STEPS:]) for run in of]) for system, of in runs.items()
    }
    return {
        "step_ms": {system: spread(1e3 * values) for system, values in seconds.items()},
        "step_time_over_static": {system: spread(values / seconds["static"]) for system, values in seconds.items()},
        "largest_load_over_static": {system: spread(values / loads["static"]) for system, values in loads.items()},
        "phases_ms": {system: _phases_ms(of) for system, of in runs.items()},
    }


def _step_seconds(run: RankRun) -> float:
    """Mean seconds of a step on the slowest rank. A collective."""
    return slowest([float(np.mean(run.seconds[_WARM_UP_STEPS:]))])[0]


def _phases_ms(runs: list[RankRun]) -> dict[str, dict[str, float]]:
    """Milliseconds of each phase of a step, the mean over ranks and steps, and its spread over runs. A collective."""
    by_phase = {}
    for phase in PHASES:
        mine = [float(np.mean([step.get(phase, 0.0) for step in run.phases[_WARM_UP_STEPS:]])) for run in runs]
        by_phase[phase] = spread(1e3 * np.array(total(mine)) / dist.get_world_size())
    return by_phase


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("convergence.step_times", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes")
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each system")
    parser.add_argument("--sequences", type=int, default=16, help="of a step, all ranks: with more, experts weigh more")
    parser.add_argument("--mbit", type=int, help="megabits a second of each rank's link, each way")
    parser.add_argument("--only-dropless", action="store_true", help="leave out the runs with a capacity")
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="for the corpus")
    given = parser.parse_args(arguments)
    if given.mbit is not None and (missing := missing_for_links()):
        parser.error(f"--mbit {given.mbit}: {missing}")
    try:
        setting = replace(
            Setting(num_steps=given.steps).over(given.ranks), sequences_per_rank=given.sequences // given.ranks
        )
        links = None if given.mbit is None else Links(num_ranks=given.ranks, mbit=given.mbit)
    except ValueError as error:
        parser.error(str(error))
    provenance, cache = collect_provenance(), given.folder / "corpus"
    load_corpus(setting.corpus, cache)
    plans = {"dropless": (None, _DROPLESS)}
    if not given.only_dropless:
        plans = {"capacity 1": (1.0, _WITH_CAPACITY), **plans}
    results = {}
    with nullcontext() if links is None else shaped(links):
        for name, (factor, systems) in plans.items():
            plan = Plan(replace(setting, capacity_factor=factor), given.rounds, cache, links)
            results[name] = run_ranks(measure, given.ranks, plan, systems, init=links is None, timeout_s=_TIMEOUT_S)[0]
            _print(name, results[name])
    name = given.name if links is None else f"{given.name}_{links.mbit}mbit"
    about = {"mbit": given.mbit, "setting": asdict(setting), "expert_share": setting.expert_share}
    write_result(name, provenance, {**about, **results})


def _print(name: str, measured: dict[str, Any]) -> None:
    for system, ratio in measured["step_time_over_static"].items():
        load = measured["largest_load_over_static"][system]["median"]
        print(f"{name:10} {system:12} step {ratio['median']:.3f} of static's, largest load {load:.3f}")


if __name__ == "__main__":
    main()
