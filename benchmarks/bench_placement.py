"""Placement policies on recorded traces: drops, imbalance and bytes, and how fast plans are made.

python -m benchmarks.bench_placement TRACE [TRACE ...] [--domains FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from benchmarks.placement_measures import switch_domains, time_planning
from benchmarks.placement_tables import draw_frontier, write_tables
from benchmarks.provenance import RESULTS, birth_certificate, write_result
from swiftmoe_lightning.analysis import CANDIDATES, Machine, PlanOptions, make_plan, read_trace

_SLOTS: Final = (2, 4, 8)
_FACTORS: Final = (1.0, 1.25, None)
_KEPT: Final = (
    "dropped",
    "imbalance",
    "bytes_gradients",
    "bytes_weights",
    "bytes_paper",
    "bytes_state_moved",
    "pairs",
    "replicas_moved",
    "planning_seconds",
    "achieved",
    "losses",
)


def compare(path: Path, num_ranks: int) -> list[dict[str, Any]]:
    """Every policy on one trace: a row for each number of slots and capacity factor."""
    trace = read_trace(path)
    rows = []
    for slots in _SLOTS:
        machine = Machine(num_ranks=num_ranks, slots_per_rank=slots)
        for factor in _FACTORS:
            options = PlanOptions(policies=tuple(CANDIDATES), capacity_factor=factor)
            found = make_plan(trace, machine, options).as_json()
            print(f"{path.stem}: {slots} slots, capacity {factor or 'none'}")
            policies = {
                name: {key: values[key] for key in _KEPT} | {"capacity_per": values["capacity_per"]}
                for name, values in found["policies"].items()
            }
            rows.append(
                {
                    "trace": path.stem,
                    "slots_per_rank": slots,
                    "capacity_factor": factor,
                    "bounds": found["bounds"],
                    "policies": policies,
                }
            )
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path, help="traces recorded step by step")
    parser.add_argument("--domains", type=Path, help="a trace whose rows are text domains: plan on one, run on another")
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--name", default="placement", help="of the result files")
    arguments = parser.parse_args()
    certificate = birth_certificate()
    results: dict[str, Any] = {
        "ranks": arguments.ranks,
        "planning": time_planning(),
        "rows": [row for path in arguments.traces for row in compare(path, arguments.ranks)],
    }
    if arguments.domains:
        results["domain_switch"] = switch_domains(arguments.domains)
    paths = [write_result(arguments.name, certificate, results)]
    paths.append(write_tables(results, RESULTS / f"{arguments.name}.md"))
    paths.append(draw_frontier(results, RESULTS / f"{arguments.name}_frontier.png"))
    print("\n".join(map(str, paths)))


if __name__ == "__main__":
    main()
