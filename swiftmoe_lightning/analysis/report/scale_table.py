"""Costs of group sizes as a table for the terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from textwrap import fill
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from swiftmoe_lightning.analysis.model_sizes import ModelSizes
from swiftmoe_lightning.analysis.report.page_text import bytes_text, many, seconds_text
from swiftmoe_lightning.analysis.report.plan_table import print_table
from swiftmoe_lightning.analysis.scale import SPARE, GroupCost
from swiftmoe_lightning.analysis.scale_advice import Advice
from swiftmoe_lightning.analysis.token_links import flat_links, two_level_links

_COLUMNS: Final = (
    "ranks",
    "g",
    "s",
    "group",
    "across",
    "messages",
    "weights",
    "tokens",
    "counts",
    "slots",
    "state",
    "buffers",
    "dense",
    "memory",
)
_WIDTH: Final = 116


def print_scale(advices: Sequence[Advice]) -> None:
    """The table, and for each number of ranks what to use and why.

    Args:
        advices: of one number of ranks, whose group sizes are all shown; or of several.
    """
    print_table(scale_table(advices))
    for advice in advices:
        first, *rest = advice.sentences()
        print(first)
        print(fill(" ".join(rest), _WIDTH, initial_indent="  ", subsequent_indent="  "))


def scale_table(advices: Sequence[Advice]) -> Table:
    """One row a group size; of several numbers of ranks the best, the default and one group of all ranks alone."""
    best = advices[0].best
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title_justify="left",
        caption_justify="left",
        title=f"{model_text(best.model)}; {best.workload.tokens:,} tokens a rank and micro-batch, "
        f"{many(best.workload.micro_batches, 'micro-batch')} a step",
        caption=_caption(best),
    )
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for advice in advices:
        for cost in advice.costs if len(advices) == 1 else advice.main_costs:
            table.add_row(*_cells(cost, advice))
        table.add_section()
    return table


def model_text(model: ModelSizes) -> str:
    """A phrase for a model's sizes."""
    return (
        f"{many(model.num_layers, 'MoE layer')} of {many(model.num_experts, 'expert')} (top {model.top_k}, "
        f"{model.dim:,} x {model.hidden_dim:,}), {model.dense_parameters / 1e9:.3g} billion other parameters"
    )


def as_json(advices: Sequence[Advice]) -> dict[str, Any]:
    """All numbers; bytes and seconds as in `GroupCost`.

    Args:
        advices: one for each number of ranks, of one model and workload.
    """
    best = advices[0].best
    return {
        "model": asdict(best.model),
        "workload": asdict(best.workload),
        "clusters": [
            {
                **asdict(advice.best.cluster),
                "groups": [_numbers(cost) for cost in advice.costs],
                "default_group_size": advice.default.group_size,
                "settings": advice.settings,
                "why": " ".join(advice.sentences()[1:]),
            }
            for advice in advices
        ],
    }


def _numbers(cost: GroupCost) -> dict[str, Any]:
    two_level = two_level_links(cost)
    return {
        "group_size": cost.group_size,
        "num_groups": cost.num_groups,
        "slots_per_rank": cost.slots_per_rank,
        "group_bytes": cost.group_bytes,
        "across_bytes": cost.across_bytes,
        "static_bytes": cost.across_bytes,
        "messages": cost.messages,
        "weight_seconds": cost.weight_seconds,
        "token_seconds": cost.token_seconds,
        "token_links": {
            "flat": asdict(flat_links(cost)),
            "two_level": None if two_level is None else asdict(two_level),
        },
        "count_seconds": cost.count_seconds,
        "step_seconds": cost.step_seconds,
        "slot_bytes": cost.slot_bytes,
        "state_bytes": cost.state_bytes,
        "host_bytes": cost.host_bytes,
        "buffer_bytes": cost.buffer_bytes,
        "dense": cost.dense,
        "dense_bytes": cost.dense_bytes(cost.dense),
        "resident_bytes": cost.resident_bytes,
        "fits": cost.fits,
        "fullest": cost.fullest,
    }


def _cells(cost: GroupCost, advice: Advice) -> tuple[str, ...]:
    return (
        f"{cost.cluster.num_ranks:,}",
        f"{'* ' if cost is advice.best else ''}{cost.group_size:,}",
        str(cost.slots_per_rank),
        bytes_text(cost.group_bytes),
        bytes_text(cost.across_bytes),
        f"{cost.messages:,}",
        *(seconds_text(value) for value in (cost.weight_seconds, cost.token_seconds, cost.count_seconds)),
        *(bytes_text(value) for value in (cost.slot_bytes, cost.state_bytes, cost.buffer_bytes)),
        f"{cost.dense} {bytes_text(cost.dense_bytes(cost.dense))}",
        f"{bytes_text(cost.resident_bytes)}{'' if cost.fits else ' !'}",
    )


def _caption(cost: GroupCost) -> str:
    cluster, workload = cost.cluster, cost.workload
    limit = f"{100 - 100 * SPARE:.0f} % of {bytes_text(cluster.gpu_bytes)}"
    tokens = "" if workload.token_dtype is None else f"tokens in {workload.token_dtype}, "
    return (
        "g: ranks of a group, s: slots of a rank. group, across: bytes that a rank sends a step within its group and "
        "across groups; static expert parallelism with a distributed optimizer sends the second alone. messages: of "
        "both. weights: seconds of both a step; tokens, counts: a micro-batch. slots to dense: memory of a rank; "
        f"memory: their sum, without activations (!: above {limit}). *: best. "
        f"Links: {bytes_text(cluster.node_bytes)}/s and {1e6 * cluster.node_latency:g} us among "
        f"{many(cluster.ranks_per_node, 'rank')}, else {bytes_text(cluster.network_bytes)}/s and "
        f"{1e6 * cluster.network_latency:g} us. Weights in {workload.param_dtype}, {tokens}gradients in "
        f"{workload.reduce_dtype}, state in {workload.state_dtype}. On paper, not measured; nothing overlaps."
    )
