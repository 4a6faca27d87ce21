"""The command `swiftmoe plan`: policies compared on a trace, or the slots, capacity and group size to take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from swiftmoe_lightning.cli.options import (
    Bytes,
    Lag,
    Policies,
    Ranks,
    Scenario,
    Slots,
    clear_errors,
    names,
    only_one,
    option,
    say,
    traces_of,
)

if TYPE_CHECKING:
    from swiftmoe_lightning.analysis import Cluster, Machine, PlanOptions, Sizes, Sweep, Trace

_Trace = Annotated[
    Path | None,
    typer.Argument(help="What PlacementRecorder wrote (.npz, .parquet), or a router trace of Megatron-Core (.jsonl)."),
]
_Budget = Annotated[str | None, option("What has a budget: rank or slot (default: each policy's own).")]
# Options that only one of the two uses.
_OF_COMPARISON: Final = ("slots", "capacity_factor", "capacity_per", "policies", "replace_every")
_OF_RECOMMENDATION: Final = ("most_dropped", "ranks_per_node", "gpu_gbytes", "picture")
# Options that a trace answers by itself.
_OF_SCENARIO: Final = ("experts", "steps", "seed")


def plan(  # noqa: PLR0913 - options
    context: typer.Context,
    trace: _Trace = None,
    scenario: Scenario = None,
    experts: Annotated[int | None, option("Experts of a scenario's layer (default: 64).", 2)] = None,
    steps: Annotated[int | None, option("Steps of a scenario (default: 300).", 1)] = None,
    seed: Annotated[int, option("Of a scenario's draws.", 0)] = 0,
    ranks: Ranks = None,
    slots: Slots = None,
    capacity_factor: Annotated[float | None, option("Token budget over the mean load (default: dropless).", 0)] = None,
    capacity_per: _Budget = None,
    policies: Policies = "balanced,packed,symi,static",
    lag: Lag = 1,
    replace_every: Annotated[str, option("Steps between two placements, or 'auto'.")] = "1",
    experts_bytes: Bytes = 1_000_000,
    state_bytes: Annotated[int | None, option("Bytes of an expert's optimizer state (default: 8 x weights).", 0)] = (
        None
    ),
    link_gbps: Annotated[float | None, option("Gb/s of a rank's link: with --tflops, models step times.")] = None,
    tflops: Annotated[float | None, option("TFLOP/s that a rank reaches.")] = None,
    assignment_flops: Annotated[float | None, option("FLOP of an assignment (default: 3 x weights' bytes).")] = None,
    token_bytes: Annotated[int, option("Bytes of a token's hidden state, on its way four times a step.", 0)] = 0,
    recommend: Annotated[
        bool, typer.Option("--recommend", help="Recommend slots, capacity factor and group size instead.")
    ] = False,
    most_dropped: Annotated[float, option("Share of assignments that may be dropped, to recommend by.", 0)] = 0.01,
    ranks_per_node: Annotated[int, option("Neighbours with fast links, to recommend for.", 1)] = 8,
    gpu_gbytes: Annotated[float, option("GB of a GPU's memory, to recommend for.")] = 80,
    picture: Annotated[Path | None, option("A file to draw the recommendation to (.png, .svg, .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what placement policies would have made of a recorded trace, before any GPU is rented.

    With --recommend, say which slots, capacity factor and group size to train with, and what more slots would buy.
    With --scenario, do either for synthetic popularity; --scenario all compares policies on every scenario.
    """
    from swiftmoe_lightning.analysis import PlanOptions, Sizes, Sweep

    with clear_errors("plan"):
        _refuse_unused(context, recommend, scenario)
        if picture is not None:
            _check_picture(picture)
        traces = traces_of(trace, scenario, num_ranks=ranks, num_experts=experts, num_steps=steps, seed=seed)
        # A recommendation finds the slots. All scenarios have the same sizes.
        sizes = Sizes.of(next(iter(traces.values())), ranks, 1 if recommend else slots, capacity_factor)
        machine = _machine(sizes, experts_bytes, state_bytes, link_gbps, tflops, assignment_flops, token_bytes)
        if recommend:
            cluster = _cluster(machine, ranks_per_node, gpu_gbytes)
            _recommend(Sweep(only_one(traces), machine, cluster, lag), most_dropped, picture, as_json)
        else:
            options = PlanOptions(
                policies=names(policies),
                capacity_factor=capacity_factor or None,
                capacity_per=capacity_per,
                lag=lag,
                replace_every=int(replace_every) if replace_every.isdigit() else replace_every,
            )
            compare = _compare_on_all if scenario == "all" else _compare
            compare(traces, machine, options, as_json)


def _machine(
    sizes: Sizes,
    experts_bytes: int,
    state_bytes: int | None,
    link_gbps: float | None,
    tflops: float | None,
    assignment_flops: float | None,
    token_bytes: int,
) -> Machine:
    from swiftmoe_lightning.analysis import Machine

    return Machine(
        num_ranks=sizes.num_ranks,
        slots_per_rank=sizes.slots_per_rank,
        expert_bytes=experts_bytes,
        state_bytes=state_bytes,
        link_bytes=None if link_gbps is None else link_gbps * 1e9 / 8,
        flops=None if tflops is None else tflops * 1e12,
        assignment_flops=assignment_flops,
        assignment_bytes=token_bytes,
    )


def _cluster(machine: Machine, ranks_per_node: int, gpu_gbytes: float) -> Cluster:
    from swiftmoe_lightning.analysis import Cluster

    return Cluster(
        num_ranks=machine.num_ranks,
        ranks_per_node=ranks_per_node,
        network_bytes=Cluster.network_bytes if machine.link_bytes is None else machine.link_bytes,
        gpu_bytes=gpu_gbytes * 1e9,
    )


def _compare(traces: Mapping[str, Trace], machine: Machine, options: PlanOptions, as_json: bool) -> None:
    from swiftmoe_lightning.analysis import make_plan
    from swiftmoe_lightning.analysis.report.plan_table import print_plan

    result = make_plan(only_one(traces), machine, options, None if as_json else say)
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    else:
        print_plan(result)


def _compare_on_all(traces: Mapping[str, Trace], machine: Machine, options: PlanOptions, as_json: bool) -> None:
    from swiftmoe_lightning.analysis import make_plan
    from swiftmoe_lightning.analysis.report.scenario_table import PAPERS_POLICY, print_scenarios

    options = replace(options, policies=tuple(dict.fromkeys([*options.policies, PAPERS_POLICY])))
    plans = {}
    for name, trace in traces.items():
        if not as_json:
            say(name)
        plans[name] = make_plan(trace, machine, options)
    if as_json:
        typer.echo(json.dumps({name: result.as_json() for name, result in plans.items()}, indent=2))
    else:
        print_scenarios(plans)


def _recommend(sweep: Sweep, most_dropped: float, picture: Path | None, as_json: bool) -> None:
    from swiftmoe_lightning.analysis.recommend import recommend
    from swiftmoe_lightning.analysis.report import sweep_table
    from swiftmoe_lightning.analysis.report.sweep_picture import draw_sweep

    points = sweep.points(None if as_json else say)
    best = recommend(points, most_dropped, sweep.most_bytes)
    if as_json:
        typer.echo(json.dumps(sweep_table.as_json(sweep, points, best), indent=2))
    else:
        sweep_table.print_recommendation(sweep, points, best)
    if picture is not None:
        draw_sweep(points, best, picture, sweep_table.title(sweep))


def _check_picture(path: Path) -> None:
    """Raise at once what drawing would raise at the end."""
    from swiftmoe_lightning.analysis import check_writable
    from swiftmoe_lightning.analysis.report.figure import import_figure

    check_writable(path)
    import_figure()


def _refuse_unused(context: typer.Context, recommend: bool, scenario: str | None) -> None:
    """Raise ValueError for an option that would have no effect."""
    if recommend:
        why = "does not go with --recommend, which compares all slots and capacities. Leave one of them out."
        unused = dict.fromkeys(_OF_COMPARISON, why)
    else:
        unused = dict.fromkeys(_OF_RECOMMENDATION, "is for recommendations. Add --recommend, or leave it out.")
    if scenario is None:
        unused |= dict.fromkeys(_OF_SCENARIO, "is for scenarios. Add --scenario, or leave it out.")
    for name, why in unused.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError(f"--{name.replace('_', '-')} {why}")
