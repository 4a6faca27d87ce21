"""`evaluate="sharded"` against `evaluate="placed"`, on gloo ranks of this machine's CPU: a forward of a prompt.

A stack of layers of experts, the same weights and routes; each rank has a prompt of a few tokens, and its forward is
the time to the first token. Experts are drawn evenly ("even"), by Zipf's law, or the first one by all tokens ("hot").
`ratio` is the time with sharded experts over that with whole ones, of forwards that alternate in the same processes,
by the slowest rank: below 1 sharded is faster. `sent_kib` is what all ranks send in a forward, `weights_mib` the
experts' weights on a rank, `recut_mib` what all ranks send to cut them once. Writes benchmarks/results/NAME.json, and
prints a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.common.command_line import add_settings, command_line, settings_of
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.evaluation.measure import ROUTINGS, WAYS, Sizes, measure
from tests.helpers import run_ranks


def print_table(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    print(f"{'routing':8} {'ratio':>6} {'95 % interval':>16} {'forward, ms':>16} {'sent, KiB':>16}  (sharded / placed)")
    for routing in ROUTINGS:
        measured = results[routing]
        ratio = {name: f"{value:.3f}" for name, value in measured["ratio"].items()}
        milliseconds = " / ".join(f"{measured['ms'][way]['median']:.2f}" for way in WAYS)
        sent = " / ".join(f"{measured['sent_kib'][way]:.0f}" for way in WAYS)
        print(f"{routing:8} {ratio['median']:>6} {ratio['low']}..{ratio['high']:>9} {milliseconds:>16} {sent:>16}")
    weights = " / ".join(f"{results['weights_mib'][way]:.1f}" for way in WAYS)
    print(f"experts' weights on a rank, MiB: {weights}; sent to cut them: {results['recut_mib']:.1f}")


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("evaluation", __doc__)
    add_settings(parser, Sizes)
    arguments = parser.parse_args(argv)
    sizes = settings_of(arguments, Sizes)
    if sizes.ranks < 2:
        parser.error(f"--ranks must be 2 or more, got {sizes.ranks}")
    provenance = collect_provenance()
    results = {"sizes": asdict(sizes), **run_ranks(measure, sizes.ranks, sizes, timeout_s=600)[0]}
    print_table(results)
    print(f"written to {write_result(arguments.name, provenance, results)}")


if __name__ == "__main__":
    main()
