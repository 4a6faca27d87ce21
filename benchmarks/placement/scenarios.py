"""Placement policies replayed on the synthetic scenarios, without processes: all figures follow from the seed.

python -m benchmarks.placement.scenarios

Every policy of `swiftmoe plan` meets every scenario of `swiftmoe_lightning.analysis.SCENARIOS`, 64 experts on
16 ranks, with the slots that training takes by default and with twice the fewest, at a capacity factor of 1 and
dropless. One layer stands for all, since layers differ in the order of their experts alone. Keys are those of
`python -m benchmarks.placement`, without times.

Writes benchmarks/results/NAME.json and NAME.md (tables).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.placement.measures import compare_policies
from benchmarks.placement.tables import write_tables
from swiftmoe_lightning.analysis import SCENARIOS, ScenarioOptions, make_scenario

SLOTS: Final = (5, 8)
CAPACITY_FACTORS: Final = (1.0, None)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("placement.scenarios", __doc__)
    parser.set_defaults(name="placement_scenarios")
    parser.add_argument("--steps", type=int, default=ScenarioOptions.num_steps, help="of each scenario")
    parser.add_argument("--seed", type=int, default=ScenarioOptions.seed, help="of all draws")
    arguments = parser.parse_args(argv)
    provenance = collect_provenance()
    options = ScenarioOptions(seed=arguments.seed, num_steps=arguments.steps, num_layers=1)
    rows: list[dict[str, Any]] = []
    for name in SCENARIOS:
        rows += compare_policies(name, make_scenario(name, options), options.num_ranks, SLOTS, CAPACITY_FACTORS)
    for row in rows:
        for numbers in row["policies"].values():
            del numbers["planning_seconds"]
    results = {"seed": options.seed, "steps": options.num_steps, "ranks": options.num_ranks, "rows": rows}
    path = write_result(arguments.name, provenance, results)
    print(f"written to {path} and {write_tables(results, path.with_suffix('.md')).name}")


if __name__ == "__main__":
    main()
