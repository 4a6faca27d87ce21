"""The paper's table and figures as ours, each beside the paper's numbers where it gives any: one command each.

python -m benchmarks.convergence.figures time-to-loss   table 3: time to a loss
python -m benchmarks.convergence.figures loss           validation loss over steps
python -m benchmarks.convergence.figures drops          dropped assignments over steps
python -m benchmarks.convergence.figures replicas       popularity of each expert, and the replicas that follow it
python -m benchmarks.convergence.figures step-time      step time by system, of each kind that is known
python -m benchmarks.convergence.figures phases         where a step's time goes, as `.step_times` has measured it
python -m benchmarks.convergence.figures auxiliary      dropped assignments by weight of the balancing loss

They show what `python -m benchmarks.convergence` has run, train what is missing, and write figures to --folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console, Group
from rich.table import Table

from benchmarks.convergence.comparison import Comparison
from benchmarks.convergence.presets import PRESETS, Experiment
from benchmarks.convergence.real_ranks import PHASES
from benchmarks.convergence.times import (
    PAPER_MINUTES,
    PAPER_NEW_PARTS,
    measured_step_times,
    modelled_seconds,
    paper_step_times,
    recorded_step_times,
)
from benchmarks.convergence.training import Run
from swiftmoe_lightning.analysis.report.figure import new_figure

# SYMI: dropped assignments with weights from 0 to where static drops as few.
_PAPER_DROPS: Final = "the paper: SYMI drops about 10 % whatever the weight, DeepSpeed about 40 % unless it is high"


def time_to_loss(experiment: Experiment, folder: Path) -> Table:
    """Time to the loss that static ends with, in static's time, beside the paper's minutes to loss 4.0."""
    comparisons = [
        Comparison(experiment.setting, by_system, measured_step_times())
        for by_system in experiment.gather(folder).values()
    ]
    table = Table("system", "the paper's minutes", "the paper", title="time to loss, static's is 1; median over seeds")
    kinds = comparisons[0].kinds("static")
    for kind in kinds:
        table.add_column(f"ours, {kind} step times")
    for system in experiment.systems:
        minutes = PAPER_MINUTES.get(system)
        paper = ("", "") if minutes is None else (f"{minutes:.2f}", f"{minutes / PAPER_MINUTES['static']:.3f}")
        times = [
            f"{1 - np.median([c.time_saved(system, 1.0, kind, ['static']) for c in comparisons]):.3f}"
            if kind in comparisons[0].kinds(system)
            else ""
            for kind in kinds
        ]
        table.add_row(system, *paper, *times)
    return table


def loss(experiment: Experiment, folder: Path) -> Figure:
    """Validation loss over steps: a line a system, the band is least to most over seeds."""
    return _over_steps(experiment, folder, "validation loss, nats a byte (no drops)", _validation_loss)


def drops(experiment: Experiment, folder: Path) -> Figure:
    """Dropped assignments over steps, a mean over 20 of them."""
    return _over_steps(experiment, folder, "dropped assignments, %", _dropped)


def _validation_loss(run: Run) -> tuple[list[int], np.ndarray]:
    # Losses before the first validation that learnt anything would hide all others.
    return run.validation_steps[2:], np.minimum.accumulate(run.validation_loss)[2:]


def _dropped(run: Run) -> tuple[list[int], np.ndarray]:
    whole = len(run.dropped) // 20 * 20
    return list(range(10, whole, 20)), 100 * np.reshape(run.dropped[:whole], (-1, 20)).mean(1)


def _over_steps(
    experiment: Experiment, folder: Path, label: str, curve: Callable[[Run], tuple[list[int], np.ndarray]]
) -> Figure:
    runs, figure = experiment.gather(folder), new_figure(experiment.title, 8, 5)
    axes = figure.subplots()
    for system in experiment.systems:
        curves = [curve(by_system[system]) for by_system in runs.values()]
        steps, values = curves[0][0], np.array([values for _, values in curves])
        (line,) = axes.plot(steps, np.median(values, axis=0), label=system)
        axes.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def replicas(experiment: Experiment, folder: Path) -> Figure:
    """Popularity and replicas of the first layer's experts over the steps, under the paper's rule and ours."""
    by_system = experiment.gather(folder)[experiment.seeds[0]]
    figure = new_figure(experiment.title, 10, 6)
    axes = figure.subplots(2, 2, sharex=True)
    for row, system in zip(axes, ("symi", "balanced"), strict=True):
        run = by_system[system]
        for axis, values, title in ((row[0], run.popularity, "popularity"), (row[1], run.replicas, "replicas")):
            image = axis.imshow(np.array(values).T, aspect="auto", interpolation="nearest", cmap="cividis")
            axis.set(title=f"{system}: {title} of each expert, first layer", xlabel="optimizer step", ylabel="expert")
            figure.colorbar(image, ax=axis)
    return figure


def step_time(experiment: Experiment, folder: Path) -> Table:
    """Step time of each system, in static's. The paper's are those of GPT-Small."""
    by_system = experiment.gather(folder)[experiment.seeds[0]]
    modelled = {system: float(modelled_seconds(run, experiment.setting).mean()) for system, run in by_system.items()}
    kinds = {
        "the paper": paper_step_times(),
        "modelled": {system: seconds / modelled["static"] for system, seconds in modelled.items()},
        **{
            f"measured, real ranks, {links}": {
                system: ratio["median"] for system, ratio in measured["step_time_over_static"].items()
            }
            for links, measured in recorded_step_times().items()
        },
    }
    table = Table("system", *kinds, title="step time, static's is 1")
    for system in experiment.systems:
        table.add_row(system, *(f"{times[system]:.3f}" if system in times else "" for times in kinds.values()))
    return table


def phases(experiment: Experiment, _folder: Path) -> Group:
    """Milliseconds of each phase of a step and its share, by system: a table for each kind of links that was measured.

    Raises:
        SystemExit: when no phases are recorded.
    """
    by_links = {
        links: measured["phases_ms"] for links, measured in recorded_step_times().items() if "phases_ms" in measured
    }
    if not by_links:
        raise SystemExit("no phases of steps are recorded. Run python -m benchmarks.convergence.step_times first.")
    return Group(*(_phases_table(links, times, experiment.systems) for links, times in by_links.items()))


def _phases_table(links: str, measured: dict[str, Any], systems: Sequence[str]) -> Table:
    medians = {
        system: {phase: ms["median"] for phase, ms in measured[system].items()}
        for system in systems
        if system in measured
    }
    totals = {system: sum(by_phase.values()) for system, by_phase in medians.items()}
    table = Table("phase", "what it is", *medians, title=f"a step on real ranks, ms and share of it; {links}")
    for phase, what in PHASES.items():
        cells = (f"{medians[system][phase]:.1f} ({medians[system][phase] / totals[system]:.1%})" for system in medians)
        table.add_row(phase, what, *cells)
    table.add_row("all", "", *(f"{total:.1f}" for total in totals.values()))
    new = ((by_phase["count"] + by_phase["place"]) / totals[system] for system, by_phase in medians.items())
    table.add_row("new", "count and place", *(f"{share:.1%}" for share in new))
    paper = ", ".join(f"{share:.2%} of {model}" for model, share in PAPER_NEW_PARTS.items())
    table.caption = (
        f"the paper: popularity all-reduce, placement and metadata take {paper}. A phase that communicates includes "
        "the wait for the slowest rank; static needs the counts as well, to know how much it receives"
    )
    return table


def auxiliary(experiment: Experiment, folder: Path) -> Table:
    """Dropped assignments by weight of the balancing loss."""
    by_weight = {
        each.setting.aux_loss_coef: each.gather(folder)
        for each in PRESETS["full"]
        if each.title in (experiment.title, "aux loss 1e-2", "no aux loss")
    }
    table = Table("system", *(f"{weight:g}" for weight in sorted(by_weight)), title="dropped assignments")
    table.caption = _PAPER_DROPS
    for system in ("static", "flexmoe-10", "symi", "balanced"):
        shares = [
            np.median([np.mean(by_system[system].dropped) for by_system in by_weight[weight].values()])
            for weight in sorted(by_weight)
        ]
        table.add_row(system, *(f"{share:.1%}" for share in shares))
    return table


_COMMANDS: Final[dict[str, Callable[[Experiment, Path], Any]]] = {
    "time-to-loss": time_to_loss,
    "loss": loss,
    "drops": drops,
    "replicas": replicas,
    "step-time": step_time,
    "phases": phases,
    "auxiliary": auxiliary,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=_COMMANDS)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="full", help="whose first experiment is shown")
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="of runs, and for figures")
    given = parser.parse_args(arguments)
    drawn = _COMMANDS[given.figure](PRESETS[given.preset][0], given.folder)
    if isinstance(drawn, Figure):
        path = given.folder / f"{given.figure}.png"
        drawn.savefig(path, dpi=130)
        print(f"written to {path}")
    else:
        Console().print(drawn)


if __name__ == "__main__":
    main()
