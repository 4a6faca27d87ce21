"""Tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from benchmarks.convergence.comparison import SHARES, Comparison
from benchmarks.convergence.presets import Experiment
from benchmarks.convergence.training import Run


def comparison_table(
    experiment: Experiment, runs: Mapping[int, Mapping[str, Run]], measured: Mapping[str, float]
) -> Table:
    """One row a system: drops, loss, and what it saves to static's losses; medians over seeds, least..most.

    Args:
        experiment: what was run.
        runs: seed -> system -> its run.
        measured: as of `Comparison`.
    """
    setting = experiment.setting
    title = (
        f"{experiment.title}: {setting.num_layers} layers, {setting.num_experts} experts (top-{setting.top_k}, "
        f"{setting.expert_share:.0%} of the blocks), {setting.num_ranks} ranks x {setting.slots_per_rank} slots, "
        f"{setting.num_steps} steps, {len(runs)} seeds"
    )
    percent = " / ".join(f"{share:.0%}" for share in SHARES)
    table = Table(title=title)
    for header in ("system", "dropped", "validation loss", f"steps saved at {percent} of static's", "time saved"):
        table.add_column(header)
    comparisons = [Comparison(setting, by_system, measured) for by_system in runs.values()]
    for system in experiment.systems:
        steps = [[comparison.steps_saved(system, share) for comparison in comparisons] for share in SHARES]
        losses = [min(by_system[system].validation_loss) for by_system in runs.values()]
        times = [
            f"{kind} {_range([comparison.time_saved(system, 1.0, kind, ['static']) for comparison in comparisons])}"
            for kind in comparisons[0].kinds(system)
        ]
        table.add_row(
            system,
            _range([comparison.drops(system) for comparison in comparisons]),
            f"{np.median(losses):.3f} ({min(losses):.3f}..{max(losses):.3f})",
            " / ".join(f"{sorted(values)[len(values) // 2]:.0%}" for values in steps),
            ", ".join(times),
        )
    return table


def _range(values: Sequence[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.1%} ({min(values):.0%}..{max(values):.0%})"
