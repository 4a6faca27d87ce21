"""Steps and time to a loss, and dropped tokens, of adaptive replication against static placement and FlexMoE.

Each run trains a GPT over bytes on an emulated cluster of 16 ranks in one process; runs that are on disk are not run
again. The last line is one JSON object: system -> figure -> median, min, max and number of runs (seeds). Figures are
fractions saved, means over the losses that static reaches at 75 and 100 % of its steps. `time_saved` is by the paper's
step times, `modelled_...` by the planner's costs for the paper's cluster, `measured_...` by steps on real ranks.

Writes benchmarks/results/NAME_PRESET.json: settings, what each system saves, and every run's losses and drops.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.convergence.comparison import headlines
from benchmarks.convergence.presets import PRESETS, Experiment
from benchmarks.convergence.tables import comparison_table
from benchmarks.convergence.times import measured_step_times
from benchmarks.convergence.training import Run


def summary(experiment: Experiment, runs: dict[int, dict[str, Run]], measured: Mapping[str, float]) -> dict[str, Any]:
    """What is written of an experiment, JSON-able: its setting, what each system saves, and every run's curve.

    Args:
        experiment: what was run.
        runs: seed -> system -> its run.
        measured: as of `Comparison`.
    """
    curves = {
        f"{system}-{seed}": {
            "dropped": round(mean(run.dropped), 4),
            "validation_loss": [round(loss, 4) for loss in run.validation_loss],
        }
        for seed, by_system in runs.items()
        for system, run in by_system.items()
    }
    saved = headlines(experiment.setting, runs, measured)
    return {"setting": asdict(experiment.setting), "saved": saved, "runs": curves}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("convergence", __doc__)
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="quick", help="quick: 10 minutes, limits: an hour, full: hours"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="for runs and corpus")
    given = parser.parse_args(arguments)
    provenance, measured = collect_provenance(), measured_step_times()
    console, results = Console(stderr=True), {}
    with Progress(console=console) as progress:
        for experiment in PRESETS[given.preset]:
            bar = progress.add_task(experiment.title, total=len(experiment.tasks))
            runs = experiment.gather(given.folder, partial(progress.advance, bar))
            results[experiment.title] = summary(experiment, runs, measured)
            progress.console.print(comparison_table(experiment, runs, measured))
    write_result(f"{given.name}_{given.preset}", provenance, results)
    print(json.dumps(results[PRESETS[given.preset][0].title]["saved"]))


if __name__ == "__main__":
    main()
