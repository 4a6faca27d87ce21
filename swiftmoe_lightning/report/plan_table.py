"""A plan as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from swiftmoe_lightning.planner.plan import Plan
from swiftmoe_lightning.report.page_text import bytes_text


def plan_table(plan: Plan) -> Table:
    """One row a policy, in the order they were asked for, and one for the bounds."""
    options, machine, trace = plan.options, plan.machine, plan.trace
    is_dropless = options.capacity_factor is None
    capacity = "dropless" if is_dropless else f"capacity factor {options.capacity_factor:g}"
    table = Table(
        title=f"{trace.num_steps} steps, {trace.num_layers} layers, {trace.num_experts} experts on {machine.num_ranks} "
        f"ranks of {machine.slots_per_rank} slots, {capacity}, plans {options.lag} old",
        caption=f"Bytes a step, all layers and ranks, for experts of {bytes_text(machine.expert_bytes)}. Imbalance: "
        "busiest rank / mean rank. Moved: experts new on a rank, a step.",
    )
    has_seconds = machine.flops is not None
    table.add_column("policy")
    names = ["dropped", "imbalance", "worst", "hosts", "gradients", "weights", "paper's way", "state", "moved", "plan"]
    for name in names + ["step", "paper's"] * has_seconds:
        table.add_column(name, justify="right", no_wrap=True)
    for name, values in plan.as_json()["policies"].items():
        cells = [f"{values['dropped']:.2%}", f"{values['imbalance']:.3f}", f"{values['imbalance_max']:.2f}"]
        cells += [f"{values['hosts']:.1f}"]
        cells += [bytes_text(values[f"bytes_{phase}"]) for phase in ("gradients", "weights", "paper", "state_moved")]
        cells += [f"{values['replicas_moved']:.1f}", f"{1000 * values['planning_seconds']:.2f} ms"]
        if has_seconds:
            cells += [f"{1000 * values[key]:.3g} ms" for key in ("step_seconds", "step_seconds_paper")]
        table.add_row(f"{name} [dim]({values['label']})[/]", *cells)
    table.add_section()
    table.add_row("best possible", f"{plan.bounds['dropped']:.2%}", f"{plan.bounds['imbalance']:.3f}")
    return table
