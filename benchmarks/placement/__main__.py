"""Placement policies replayed on recorded traces, without processes: how much they drop, how even, for which bytes.

Every policy meets every trace, at 2, 4 and 8 slots a rank, with capacity factors of 1, 1.25 and none. By policy:

dropped     share of token assignments that are over a capacity, 0 to 1; `bounds` has the least there can be
imbalance   load of the busiest rank over the mean of ranks
bytes_*     a step's bytes of both weight phases. Tables and the picture divide them by `bytes_paper` of `symi`: what
            the paper's way sends with its own placements
planning    microseconds of a token split and of placements at scale, on one core
domains     with --domains: plans for one text domain run on another, share dropped, beside a uniform placement's

Writes benchmarks/results/NAME.json, NAME.md (tables) and NAME_frontier.png (bytes against drops and imbalance).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.placement.measures import compare_policies, switch_domains, time_planning
from benchmarks.placement.tables import draw_frontier, write_tables
from swiftmoe_lightning.analysis import read_trace

_PLANNING_SECONDS: Final = 3.0


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("placement", __doc__)
    parser.add_argument("traces", nargs="+", type=Path, help="traces recorded step by step")
    parser.add_argument("--domains", type=Path, help="a trace of text domains as steps: plan on one, run on another")
    parser.add_argument("--ranks", type=int, default=16, help="of the machine that the traces are replayed on")
    parser.add_argument(
        "--planning-seconds", type=float, default=_PLANNING_SECONDS, help="for each planning time, at ten calls or more"
    )
    arguments = parser.parse_args(argv)
    provenance = collect_provenance()
    results: dict[str, Any] = {
        "ranks": arguments.ranks,
        "planning": time_planning(arguments.planning_seconds),
        "rows": [
            row for path in arguments.traces for row in compare_policies(path.stem, read_trace(path), arguments.ranks)
        ],
    }
    if arguments.domains:
        results["domain_switch"] = switch_domains(read_trace(arguments.domains).popularity_ULE)
    path = write_result(arguments.name, provenance, results)
    tables = write_tables(results, path.with_suffix(".md"))
    picture = draw_frontier(results, path.with_name(f"{arguments.name}_frontier.png"))
    print(f"written to {path}, {tables.name} and {picture.name}")


if __name__ == "__main__":
    main()
