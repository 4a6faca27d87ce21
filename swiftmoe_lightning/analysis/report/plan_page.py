"""A plan, and the run that its trace was recorded from, as a report page. U steps, L layers, E experts, W ranks."""

from __future__ import annotations

import numpy as np

from swiftmoe_lightning.analysis.plan import Outcome, Plan
from swiftmoe_lightning.analysis.report.page_data import PageData, PolicySeries
from swiftmoe_lightning.analysis.report.plan_table import age_text
from swiftmoe_lightning.analysis.trace import Trace


def plan_page(plan: Plan, title: str) -> PageData:
    """The page's data for `plan`. Where the trace has its own run's placements and loads, the run comes first.

    Args:
        plan: the policies, replayed.
        title: the page's.
    """
    machine, options, trace = plan.machine, plan.options, plan.trace
    series = [_series(name, outcome) for name, outcome in plan.outcomes.items()]
    if {"loads", "dropped", "moved"} <= trace.recorded.keys():
        series.insert(0, _recorded(trace))
    return PageData(
        title=title,
        subtitle=f"{machine.num_ranks} ranks of {machine.slots_per_rank} slots, plans {age_text(options.lag)}",
        counts_ULE=trace.popularity_ULE,
        step_U=trace.step_U,
        layers=tuple(trace.layers),
        policies=tuple(series),
        capacity_factor=options.capacity_factor,
    )


def _series(name: str, outcome: Outcome) -> PolicySeries:
    replayed = outcome.replay
    return PolicySeries(
        name=name,
        label=outcome.candidate.label,
        replicas_ULE=replayed.replicas_ULE,
        dropped_UL=replayed.dropped_UL,
        load_ULW=replayed.load_ULW,
        moved_UL=replayed.moved_UL,
        bytes_gradients=outcome.bytes_gradients,
        bytes_weights=outcome.bytes_weights,
        bytes_paper=outcome.bytes_paper,
        bytes_state_moved=outcome.bytes_state_moved,
        losses=replayed.losses,
    )


def _recorded(trace: Trace) -> PolicySeries:
    recorded = trace.recorded
    return PolicySeries(
        name="recorded",
        label="the run itself",
        replicas_ULE=recorded.get("replicas"),
        dropped_UL=np.asarray(recorded["dropped"]),
        load_ULW=np.asarray(recorded["loads"]),
        moved_UL=np.asarray(recorded["moved"]),
        bytes_gradients=None,
        bytes_weights=None,
        bytes_paper=None,
        bytes_state_moved=None,
        losses={},
    )
