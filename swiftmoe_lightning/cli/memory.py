"""The command `swiftmoe memory`: what a model needs on few ranks, and what saves it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from swiftmoe_lightning.cli.options import MODEL_HELP, clear_errors, option


def memory(  # noqa: PLR0913 - options
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    ranks: Annotated[str, option("Ranks, or several numbers of them with commas between.")] = "1,2,8",
    tokens: Annotated[int, option("Tokens of a rank and micro-batch.", 1)] = 4096,
    micro_batches: Annotated[int, option("Micro-batches of a step.", 1)] = 1,
    gpu_gbytes: Annotated[float, option("GB of a GPU's memory.")] = 80,
    param_dtype: Annotated[str, option("Of slots, and of weights and tokens on the wire.")] = "bfloat16",
    reduce_dtype: Annotated[str, option("Of gradients on the wire.")] = "bfloat16",
    state_dtype: Annotated[str, option("Of owned parameters, gradients and Adam's moments.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what memory a model needs on few ranks, on paper: as it is, offloaded, and with slots that are freed."""
    from swiftmoe_lightning.analysis import Cluster, Workload, model_of
    from swiftmoe_lightning.analysis.report import memory_table

    with clear_errors("memory"):
        work = Workload(
            tokens=tokens,
            micro_batches=micro_batches,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            state_dtype=state_dtype,
        )
        clusters = Cluster(num_ranks=1, gpu_bytes=gpu_gbytes * 1e9).of_sizes(ranks)
        costs = memory_table.memory_costs(model_of(model, {}), clusters, work)
    if as_json:
        typer.echo(json.dumps(memory_table.memory_json(costs), indent=2))
    else:
        memory_table.print_memory(costs)
