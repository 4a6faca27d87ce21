"""A plan as a table for the terminal."""

from __future__ import annotations

from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from swiftmoe_lightning.analysis.plan import Plan
from swiftmoe_lightning.analysis.report.page_text import bytes_text, many

_COLUMNS: Final = (
    "dropped",
    "imbalance",
    "sent",
    "paper's",
    "state",
    "moved",
    "planned",
    "step",
    "paper's step",
)
# Characters, more than any table needs.
_WIDEST: Final = 1000


def print_plan(plan: Plan) -> None:
    """The plan's table on standard output."""
    print_table(plan_table(plan))


def print_table(table: Table) -> None:
    """A table on standard output. Numbers are never cut: where the terminal, or a file, is too narrow, rows wrap."""
    console = Console()
    wide = console.options.update(max_width=_WIDEST)
    console.width = max(console.width, Measurement.get(console, wide, table).maximum)
    console.print(table)


def plan_table(plan: Plan) -> Table:
    """One row a policy, in the order they were asked for, and one for the bounds."""
    is_dropless = plan.options.capacity_factor is None
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=size_text(plan),
        caption="imbalance: busiest rank / mean rank. sent: bytes a step in both weight phases, all layers and ranks, "
        f"for experts of {bytes_text(plan.machine.expert_bytes)}; paper's: the same placements, sent its way. moved: "
        "experts new on a rank, a step.",
    )
    table.add_column("policy", no_wrap=True)
    rows = {name: _cells(values) for name, values in plan.as_json()["policies"].items()}
    shown = [column for column in _COLUMNS if any(cells[column] is not None for cells in rows.values())]
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *[cells[column] or "" for column in shown])
    table.add_section()
    bounds = [] if is_dropless else [f"{plan.bounds['dropped']:.2%}"]
    table.add_row("best possible", *bounds, f"{plan.bounds['imbalance']:.3f}")
    return table


def size_text(plan: Plan) -> str:
    """A phrase for the trace, the ranks, the capacity and the age of plans."""
    options, machine, trace = plan.options, plan.machine, plan.trace
    capacity = "dropless" if options.capacity_factor is None else f"capacity factor {options.capacity_factor:g}"
    return (
        f"{many(trace.num_steps, 'step')}, {many(trace.num_layers, 'layer')}, "
        f"{many(trace.num_experts, 'expert')} on {many(machine.num_ranks, 'rank')} of "
        f"{many(machine.slots_per_rank, 'slot')}, {capacity}, plans {age_text(options.lag)}"
    )


def age_text(lag: int) -> str:
    """A phrase for the age of plans."""
    return "from the step itself" if lag == 0 else f"{lag} step{'s' * (lag > 1)} old"


def _cells(values: dict[str, Any]) -> dict[str, str | None]:
    """Column -> text; None where there is nothing to show."""
    seconds = values["step_seconds"], values["step_seconds_paper"]
    step, paper = (None if s is None else f"{1000 * s:.3g} ms" for s in seconds)
    state = values["bytes_state_moved"]
    texts = (
        f"{values['dropped']:.2%}" if values["capacity_per"] else None,
        f"{values['imbalance']:.3f}",
        bytes_text(values["bytes_gradients"] + values["bytes_weights"]),
        bytes_text(values["bytes_paper"]),
        bytes_text(state) if state else None,
        f"{values['replicas_moved']:.1f}",
        f"{1000 * values['planning_seconds']:.2f} ms",
        step,
        paper,
    )
    return dict(zip(_COLUMNS, texts, strict=True))
