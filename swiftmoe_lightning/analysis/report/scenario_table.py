"""Policies on all scenarios as one table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from swiftmoe_lightning.analysis.plan import Plan
from swiftmoe_lightning.analysis.report.plan_table import print_table, size_text
from swiftmoe_lightning.analysis.scenarios import SCENARIOS

# The policy whose placements, sent the paper's way, are the unit of bytes.
PAPERS_POLICY: Final = "symi"
_WIDTH: Final = 100


def print_scenarios(plans: Mapping[str, Plan]) -> None:
    """The table of `plans`, and what each scenario is, on standard output."""
    print_table(scenario_table(plans))
    for name in plans:
        print(fill(f"{name}: {SCENARIOS[name].about}", _WIDTH))


def scenario_table(plans: Mapping[str, Plan]) -> Table:
    """One row a scenario and one column a policy: what it lost, and what it sent.

    Args:
        plans: by scenario, all of the same policies, `PAPERS_POLICY` among them, and the same sizes.
    """
    plan = next(iter(plans.values()))
    lost = "imbalance (busiest rank / mean rank)" if plan.options.capacity_factor is None else "dropped"
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=size_text(plan),
        caption=f"{lost} / bytes of both weight phases, over what the paper's way sends with the placements of "
        f"{PAPERS_POLICY}. best: the least that any placement which knows the step can lose.",
    )
    for name in ("scenario", *plan.outcomes, "best"):
        table.add_column(name, justify="left" if name == "scenario" else "right", no_wrap=True)
    for scenario, plan in plans.items():
        cells = [f"{_lost_text(plan, name)} / {_sent_over_paper(plan, name):.2f}" for name in plan.outcomes]
        table.add_row(scenario, *cells, _lost_text(plan, None))
    return table


def _sent_over_paper(plan: Plan, policy: str) -> float:
    """Bytes of both weight phases, over what the paper's way sends with the placements of `PAPERS_POLICY`."""
    outcome = plan.outcomes[policy]
    return (outcome.bytes_gradients + outcome.bytes_weights) / plan.outcomes[PAPERS_POLICY].bytes_paper


def _lost_text(plan: Plan, policy: str | None) -> str:
    """What a policy, or none (the bound), lost."""
    numbers = plan.as_json()
    lost = numbers["bounds"] if policy is None else numbers["policies"][policy]
    return f"{lost['imbalance']:.3f}" if plan.options.capacity_factor is None else f"{lost['dropped']:.2%}"
