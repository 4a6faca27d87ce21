"""`ep_implementation="swiftmoe"` against transformers' own "all_to_all", on gloo ranks of this machine's CPU.

One Qwen3-MoE, the same ranks, batches and routes; a step is forward, backward and fused AdamW. Experts are drawn with
equal popularities ("balanced"), or by Zipf's law. `ratio` is our time over theirs, of blocks of steps that alternate in
the same processes: below 1 we are faster. `peak_mib` is the most memory of a rank's process, torch included, of each in
processes of its own. Writes benchmarks/results/NAME.json, and prints a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.common.command_line import add_settings, command_line, settings_of
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.huggingface_ep.measure import OURS, THEIRS, Effort, measure_memory, measure_times
from benchmarks.huggingface_ep.workload import ROUTINGS, Sizes, save_model
from tests.helpers import run_ranks

_TIMEOUT_S: Final = 3600


def print_table(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    print(f"\n{'routing':9} {'ratio':>6} {'its 95 % interval':>18} {'step, ms':>21} {'peak, MiB':>21}  (ours / theirs)")
    for routing in ROUTINGS:
        measured = results[routing]
        ratio = {name: f"{value:.3f}" for name, value in measured["ratio"].items()}
        step = " / ".join(f"{measured['step_ms'][kind]['median']:.1f}" for kind in (OURS, THEIRS))
        peak = " / ".join(f"{measured['peak_mib'][kind]:.0f}" for kind in (OURS, THEIRS))
        print(f"{routing:9} {ratio['median']:>6} {ratio['low']}..{ratio['high']:>11} {step:>21} {peak:>21}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("huggingface_ep", __doc__)
    add_settings(parser, Effort, Sizes)
    arguments = parser.parse_args(argv)
    sizes, effort = settings_of(arguments, Sizes), settings_of(arguments, Effort)
    if effort.ep_size < 2 or effort.ranks % effort.ep_size or sizes.experts % effort.ep_size:
        parser.error(f"--ep-size must be 2 or more and divide --ranks and --experts, got {effort.ep_size}")
    provenance = collect_provenance()
    results: dict[str, Any] = {"sizes": asdict(sizes), "effort": asdict(effort)}
    with TemporaryDirectory() as folder:
        save_model(sizes, Path(folder))
        for routing in ROUTINGS:
            results[routing] = run_ranks(measure_times, effort.ranks, folder, routing, effort, timeout_s=_TIMEOUT_S)[0]
            results[routing]["peak_mib"] = {
                kind: run_ranks(measure_memory, effort.ranks, folder, kind, routing, effort, timeout_s=_TIMEOUT_S)[0]
                for kind in (OURS, THEIRS)
            }
    print_table(results)
    print(f"written to {write_result(arguments.name, provenance, results)}")


if __name__ == "__main__":
    main()
