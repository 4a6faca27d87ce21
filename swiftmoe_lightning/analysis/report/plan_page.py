"""A plan, and the run that its trace was recorded from, as a report page. U steps, L layers, E experts, W ranks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from swiftmoe_lightning.analysis.plan import Outcome, Plan
from swiftmoe_lightning.analysis.report.page_data import PageData, PolicySeries
from swiftmoe_lightning.analysis.report.plan_table import age_text
from swiftmoe_lightning.analysis.sizes import Sizes
from swiftmoe_lightning.analysis.trace import Trace


def plan_page(plan: Plan, title: str) -> PageData:
    """The page's data for `plan`. Where the trace has its own run's placements and loads, the run comes first.

    Args:
        plan: the policies, replayed.
        title: the page's.
    """
    machine, options, trace = plan.machine, plan.options, plan.trace
    series = [_series(name, outcome) for name, outcome in plan.outcomes.items()]
    series[:0] = _recorded(trace)
    return PageData(
        title=title,
        subtitle=f"{machine.num_ranks} ranks of {machine.slots_per_rank} slots, plans {age_text(options.lag)}",
        counts_ULE=trace.popularity_ULE,
        step_U=trace.step_U,
        layers=tuple(trace.layers),
        policies=tuple(series),
        capacity_factor=options.capacity_factor,
    )


def run_page(trace: Trace, title: str) -> PageData:
    """The page's data for a run alone, as far as it is recorded: no policy is replayed.

    Args:
        trace: of the run.
        title: the page's.

    Raises:
        ValueError: where the trace's metadata is damaged.
    """
    ranks, slots = (trace.metadata.get(key) for key in ("world_size", "slots_per_rank"))
    return PageData(
        title=title,
        subtitle="" if None in (ranks, slots) else f"{ranks} ranks of {slots} slots",
        counts_ULE=trace.popularity_ULE,
        step_U=trace.step_U,
        layers=tuple(trace.layers),
        policies=tuple(replace(run, name="this run", label="as recorded") for run in _recorded(trace)),
        capacity_factor=Sizes.of(trace, 1, 1, None).capacity_factor,
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


def _recorded(trace: Trace) -> tuple[PolicySeries, ...]:
    """The run itself, if the trace has its loads: one series or none."""
    recorded = trace.recorded
    if not {"loads", "dropped", "moved"} <= recorded.keys():
        return ()
    run = PolicySeries(
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
    return (run,)
