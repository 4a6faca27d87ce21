"""The memory of a rank under each way to save it, as a table for the terminal and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import fill
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from swiftmoe_lightning.analysis.cluster import Cluster, Workload
from swiftmoe_lightning.analysis.model_sizes import ModelSizes
from swiftmoe_lightning.analysis.report.page_text import bytes_text, many
from swiftmoe_lightning.analysis.report.plan_table import print_table
from swiftmoe_lightning.analysis.report.scale_table import model_text
from swiftmoe_lightning.analysis.scale import SPARE, GroupCost
from swiftmoe_lightning.config import SwiftMoEConfig

_WAYS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("", {}),
    ("offload_optimizer", {"offload_optimizer": True}),
    ("and reshard_after_forward", {"offload_optimizer": True, "reshard_after_forward": True}),
)
_COLUMNS: Final = ("slots", "state", "buffers", "dense", "GPU", "CPU", "sent a step")
_WIDTH: Final = 110


def memory_costs(model: ModelSizes, clusters: Sequence[Cluster], workload: Workload) -> list[tuple[str, GroupCost]]:
    """What a rank needs, for each number of ranks without offload, with it, and with slots that are freed, too.

    Args:
        model: the sizes.
        clusters: one for each number of ranks; groups are of the default size.
        workload: of a rank.

    Returns:
        The options' names, and the cost.
    """
    costs = []
    for cluster in clusters:
        size = SwiftMoEConfig().resolve_expert_parallel_size(cluster.num_ranks)
        costs += [(name, GroupCost(model, cluster, replace(workload, **options), size)) for name, options in _WAYS]
    return costs


def print_memory(costs: Sequence[tuple[str, GroupCost]]) -> None:
    """One row for each number of ranks and way."""
    first = costs[0][1]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title_justify="left", title=model_text(first.model))
    table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("options", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    for index, (name, cost) in enumerate(costs):
        table.add_row(*_cells(name, cost), end_section=index % len(_WAYS) == len(_WAYS) - 1)
    print_table(table)
    workload, limit = first.workload, f"{100 - 100 * SPARE:.0f} % of {bytes_text(first.cluster.gpu_bytes)}"
    print(
        fill(
            "Memory of a rank. state: experts' parameters, gradients and Adam's moments. buffers: what is on its way, "
            f"and slots' gradients, over {many(workload.micro_batches, 'micro-batch')} a step. GPU: the sum, without "
            f"activations (!: above {limit}). sent a step: by a rank, of both weight phases. Slots in "
            f"{workload.param_dtype}, gradients on the wire in {workload.reduce_dtype}, state in "
            f"{workload.state_dtype}. On paper, not measured.",
            _WIDTH,
        )
    )


def memory_json(costs: Sequence[tuple[str, GroupCost]]) -> list[dict[str, Any]]:
    """All numbers, in bytes, of each row of the table."""
    return [
        {
            "num_ranks": cost.cluster.num_ranks,
            "offload_optimizer": cost.workload.offload_optimizer,
            "reshard_after_forward": cost.workload.reshard_after_forward,
            "slot_bytes": cost.slot_bytes,
            "state_bytes": cost.state_bytes,
            "buffer_bytes": cost.buffer_bytes,
            "dense": cost.dense,
            "dense_bytes": cost.dense_bytes(cost.dense),
            "gpu_bytes": cost.resident_bytes,
            "host_bytes": cost.host_bytes,
            "sent_bytes": cost.group_bytes + cost.across_bytes,
            "fits": cost.fits,
        }
        for _, cost in costs
    ]


def _cells(name: str, cost: GroupCost) -> tuple[str, ...]:
    return (
        "" if name else f"{cost.cluster.num_ranks:,}",
        name,
        *(bytes_text(value) for value in (cost.slot_bytes, cost.state_bytes, cost.buffer_bytes)),
        f"{cost.dense} {bytes_text(cost.dense_bytes(cost.dense))}",
        f"{bytes_text(cost.resident_bytes)}{'' if cost.fits else ' !'}",
        bytes_text(cost.host_bytes),
        bytes_text(cost.group_bytes + cost.across_bytes),
    )
