"""The training step, measured: what a new placement in every step costs, in time and bytes, and the update's speed.

python -m benchmarks.bench_step
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from typing import Any

from benchmarks.provenance import birth_certificate, write_result
from benchmarks.ranks import run_ranks
from benchmarks.step_measures import check_bytes, compare_placements, time_phases, time_update
from benchmarks.workload import Sizes, Trainee


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How often things are measured.

    ranks: gloo processes. rounds: times that the two runs swap roles. pairs: measured in a round, two blocks of each
    run. steps: in a block. repeats: pairs of updates by each optimizer, and steps that are split into phases.
    """

    ranks: int = 4
    rounds: int = 6
    pairs: int = 4
    steps: int = 2
    repeats: int = 50


def measure(sizes: Sizes, effort: Effort) -> dict[str, Any]:
    """Everything, on each rank."""
    trainees = Trainee(sizes), Trainee(sizes)
    return {
        **compare_placements(trainees, effort.rounds, effort.pairs, effort.steps),
        "bytes": check_bytes(trainees[0], effort.repeats),
        "update": time_update(sizes, None, effort.repeats),
        "update_fused": time_update(sizes, True, effort.repeats),
        "phases_ms": time_phases(trainees, effort.repeats),
    }


def print_table(results: dict[str, Any]) -> None:
    """The results for people."""
    print(f"\n{'ratio':40} {'median':>7} {'its 95 % interval':>18} {'10..90 % of pairs':>18}  target")
    for label, key, target in (
        ("step, adapting / fixed", "adapting", "<= 1.02"),
        ("control, fixed / fixed", "control", ""),
        ("update, prepared / stock AdamW", "update", "<= 1.1"),
        ("update, prepared / stock, fused", "update_fused", "<= 1.1"),
    ):
        for clock in ("wall", "cpu"):
            ratio = {name: f"{value:.3f}" for name, value in results[key][f"{clock}_ratio"].items()}
            interval, pairs = f"{ratio['low']}..{ratio['high']}", f"{ratio['p10']}..{ratio['p90']}"
            print(f"{f'{label}, {clock} time':40} {ratio['median']:>7} {interval:>18} {pairs:>18}  {target}")
    header = f"{'a step':9} {'wall, ms':>9} {'CPU, ms':>9} {'MB sent':>9} {'imbalance':>10} {'pairs moved':>12}"
    print(f"\n{header}  (CPU, MB: all ranks)")
    for label, role in (("adapting", "run"), ("fixed", "baseline")):
        books = results["adapting"][role]
        wall, cpu = books["step_ms"]["median"], books["cpu_ms_per_step"]["median"]
        megabytes, moved = books["bytes_sent_per_step"] / 1e6, books["pairs_moved_per_step"]
        print(f"{label:9} {wall:9.1f} {cpu:9.1f} {megabytes:9.3f} {books['imbalance']:10.3f} {moved:12.2f}")
    sent = results["bytes"]
    print(
        f"\nbytes a step, all ranks: collect {sent['collect_all_ranks']:.0f}, distribute "
        f"{sent['distribute_all_ranks']:.0f}, by the formula {sent['formula_all_ranks']:.0f}; counted and planned were "
        f"equal on each rank in each of {sent['steps_checked']} steps"
    )
    for role, phases in results["phases_ms"].items():
        print(f"phases, ms, {role}: " + ", ".join(f"{name} {ms['median']:.1f}" for name, ms in phases.items()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--name", default="step", help="of the result file")
    for settings in (Effort, Sizes):
        for setting in fields(settings):
            name = "--" + setting.name.replace("_", "-")
            parser.add_argument(name, type=int, default=setting.default, help=settings.__name__.lower())
    given = vars(parser.parse_args())
    sizes = Sizes(**{setting.name: given[setting.name] for setting in fields(Sizes)})
    effort = Effort(**{setting.name: given[setting.name] for setting in fields(Effort)})
    if sizes.dim % effort.ranks or sizes.hidden_dim % effort.ranks or effort.ranks < 2:
        parser.error(f"--ranks must be 2 or more and divide --dim and --hidden-dim, got {effort.ranks}")
    certificate = birth_certificate()
    measured = run_ranks(measure, effort.ranks, sizes, effort)
    results = {"sizes": asdict(sizes), "effort": asdict(effort), **measured}
    print_table(results)
    print(f"written to {write_result(given['name'], certificate, results).name}")


if __name__ == "__main__":
    main()
