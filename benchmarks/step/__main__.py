"""The training step on gloo ranks of this machine's CPU: what a new placement in every step costs, and the update.

adapting      a step with a new placement every step, over the same with one that was made once from the same
              popularity and kept: equal bytes, equal imbalance, so the ratio is the cost of adapting alone
control       the same with both placements kept: how far it is from 1 is how well this machine could tell
bytes         bytes that each rank counted in each phase, asserted to be what the plans and the formula say
update        the optimizer's step on sharded parameters, over stock AdamW on plain tensors of the same local shapes
update_fused  the same with fused=True
phases_ms     milliseconds of one step by phase

Each ratio is of wall time, and of CPU time summed over ranks, of two that run alternately in the same processes. Writes
benchmarks/results/NAME.json, and prints a table with the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from benchmarks.common.command_line import add_settings, command_line, settings_of
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.step.measures import Effort, measure
from benchmarks.step.workload import Sizes
from tests.helpers import run_ranks

# Ranks run functions of other modules: started processes do not import the `__main__` of a package.
# Of a collective: the other ranks wait in one while rank 0 times the update alone.
_TIMEOUT_S: Final = 3600


def print_table(results: dict[str, Any]) -> None:
    """Print the results as a table."""
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
        step = results["adapting"][role]
        wall, cpu = step["step_ms"]["median"], step["cpu_ms_per_step"]["median"]
        megabytes, moved = step["bytes_sent_per_step"] / 1e6, step["pairs_moved_per_step"]
        print(f"{label:9} {wall:9.1f} {cpu:9.1f} {megabytes:9.3f} {step['imbalance']:10.3f} {moved:12.2f}")
    sent = results["bytes"]
    print(
        f"\nbytes a step, all ranks: collect {sent['collect_all_ranks']:.0f}, distribute "
        f"{sent['distribute_all_ranks']:.0f}, by the formula {sent['formula_all_ranks']:.0f}; counted and planned were "
        f"equal on each rank in each of {sent['steps_checked']} steps"
    )
    for role, phases in results["phases_ms"].items():
        print(f"phases, ms, {role}: " + ", ".join(f"{name} {ms['median']:.1f}" for name, ms in phases.items()))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("step", __doc__)
    add_settings(parser, Effort, Sizes)
    arguments = parser.parse_args(argv)
    sizes, effort = settings_of(arguments, Sizes), settings_of(arguments, Effort)
    if sizes.dim % effort.ranks or sizes.hidden_dim % effort.ranks or effort.ranks < 2:
        parser.error(f"--ranks must be 2 or more and divide --dim and --hidden-dim, got {effort.ranks}")
    provenance = collect_provenance()
    measured = run_ranks(measure, effort.ranks, sizes, effort, timeout_s=_TIMEOUT_S)[0]
    results = {"sizes": asdict(sizes), "effort": asdict(effort), **measured}
    print_table(results)
    print(f"written to {write_result(arguments.name, provenance, results)}")


if __name__ == "__main__":
    main()
