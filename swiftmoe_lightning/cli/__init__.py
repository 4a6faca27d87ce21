"""The command `swiftmoe`."""

from __future__ import annotations

import json
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from swiftmoe_lightning.cli.memory import memory
from swiftmoe_lightning.cli.options import (
    MODEL_HELP,
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
from swiftmoe_lightning.cli.plan import plan
from swiftmoe_lightning.demo.options import DemoOptions

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


class Strategy(StrEnum):
    """How experts are placed."""

    both = "both"
    swiftmoe = "swiftmoe"
    static = "static"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swiftmoe-lightning {metadata.version('swiftmoe-lightning')}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def swiftmoe(version: _Version = False) -> None:
    """Mixture-of-Experts training with experts replicated by popularity, anew every step."""


@app.command()
def train(  # noqa: PLR0913 - options
    strategy: Annotated[Strategy, option("Experts replicated by popularity, or static, or both compared.")] = (
        Strategy.both
    ),
    data: Annotated[Path | None, option("A text file to train on instead of Shakespeare.")] = None,
    steps: Annotated[int, option("Optimizer steps.", 1)] = DemoOptions.steps,
    ranks: Annotated[int | None, option("Processes: all GPUs, or 4 on the CPU, by default.", 1)] = None,
    layers: Annotated[int, option("Transformer layers, each with its own experts.", 1)] = DemoOptions.layers,
    dim: Annotated[int, option("Width of the model, a multiple of 32.", 1)] = DemoOptions.dim,
    hidden_dim: Annotated[int, option("Inner width of an expert.", 1)] = DemoOptions.hidden_dim,
    experts: Annotated[int, option("Experts of a layer.", 1)] = DemoOptions.experts,
    top_k: Annotated[int, option("Experts that a byte is sent to.", 1)] = DemoOptions.top_k,
    seq_len: Annotated[int, option("Bytes of a sequence.", 1)] = DemoOptions.seq_len,
    batch_size: Annotated[int, option("Sequences of a step, all ranks together.", 1)] = DemoOptions.batch_size,
    slots_per_rank: Annotated[int | None, option("Places for experts on a rank; by default twice the need.", 1)] = None,
    capacity_factor: Annotated[float, option("Token budget over the mean load; 0 drops no token.", 0)] = (
        DemoOptions.capacity_factor
    ),
    aux_loss_coef: Annotated[float, option("Weight of the load-balancing loss.", 0)] = DemoOptions.aux_loss_coef,
    lr: Annotated[float, option("Learning rate.", 0)] = DemoOptions.lr,
    seed: Annotated[int, option("Decides weights and data: runs of one seed can be compared.", 0)] = DemoOptions.seed,
    out: Annotated[
        Path | None, option("Run folder; an earlier run's files in it are replaced (default: runs/STRATEGY, or runs).")
    ] = None,
) -> None:
    """Train a small byte-level GPT on real text, with static and with adaptive replicas, and compare the two."""
    # Imported in the function, since `--help` and a mistyped option must not wait for torch.
    from swiftmoe_lightning.demo.both import BothDemos
    from swiftmoe_lightning.demo.run import Demo

    with clear_errors("train"):
        options = DemoOptions(
            strategy=strategy.value,
            data=data,
            steps=steps,
            ranks=ranks,
            layers=layers,
            dim=dim,
            hidden_dim=hidden_dim,
            experts=experts,
            top_k=top_k,
            seq_len=seq_len,
            batch_size=batch_size,
            slots_per_rank=slots_per_rank,
            capacity_factor=capacity_factor,
            aux_loss_coef=aux_loss_coef,
            lr=lr,
            seed=seed,
            out=out,
        )
        demo = BothDemos(options) if strategy is Strategy.both else Demo(options)
    demo.run()


app.command()(plan)


@app.command()
def report(  # noqa: PLR0913 - options
    run_or_trace: Annotated[
        Path | None, typer.Argument(help="A run folder of `swiftmoe train`, or a trace as for `plan`.")
    ] = None,
    scenario: Scenario = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    ranks: Ranks = None,
    slots: Slots = None,
    capacity_factor: Annotated[float | None, option("Budget over mean load (default: the trace's own).", 0)] = None,
    policies: Policies = "balanced,symi,static",
    lag: Lag = 1,
    experts_bytes: Bytes = 1_000_000,
) -> None:
    """Draw a run or a trace as one page that opens offline: popularity, replicas, drops, imbalance, bytes."""
    from swiftmoe_lightning.analysis import Machine, PlanOptions, Sizes, check_writable, make_plan
    from swiftmoe_lightning.analysis.report.page import write_page
    from swiftmoe_lightning.analysis.report.page_text import path_text
    from swiftmoe_lightning.analysis.report.plan_page import plan_page

    with clear_errors("report"):
        # An error of the path comes before the replays.
        check_writable(out)
        title = str(scenario) if run_or_trace is None else run_or_trace.name
        recorded = only_one(traces_of(_recording(run_or_trace), scenario, num_ranks=ranks))
        sizes = Sizes.of(recorded, ranks, slots, capacity_factor)
        machine = Machine(num_ranks=sizes.num_ranks, slots_per_rank=sizes.slots_per_rank, expert_bytes=experts_bytes)
        options = PlanOptions(policies=names(policies), capacity_factor=sizes.capacity_factor, lag=lag)
        write_page(out, plan_page(make_plan(recorded, machine, options, say), title))
    typer.echo(f"{path_text(out)}: {out.stat().st_size / 1e6:.1f} MB. Open it in a browser.")


def _recording(run_or_trace: Path | None) -> Path | None:
    """The recording in a run folder; anything else as it is."""
    if run_or_trace is not None and (recording := run_or_trace / "placements.npz").exists():
        return recording
    return run_or_trace


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, or PlacementRecorder's file; it may come later.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1 (default: a free one).", min=0, max=65535)] = 0,
) -> None:
    """Show a run's page in a browser of this machine, live while the run goes on, until Ctrl-C."""
    from swiftmoe_lightning.analysis.report.watch import LivePage, PageServer

    with clear_errors("watch"):
        server = PageServer(LivePage(run), port)
    typer.echo(f"Open {server.url} in a browser. Ctrl-C ends this.")
    server.serve_until_interrupted()


@app.command()
def scale(  # noqa: PLR0913 - options
    model: Annotated[str | None, typer.Argument(help=MODEL_HELP)] = None,
    layers: Annotated[int | None, option("MoE layers (default, as of the next four: the model's).", 1)] = None,
    experts: Annotated[int | None, option("Experts of a layer.", 1)] = None,
    top_k: Annotated[int | None, option("Experts of a token.", 1)] = None,
    dim: Annotated[int | None, option("Width of the model.", 1)] = None,
    hidden_dim: Annotated[int | None, option("Inner width of an expert.", 1)] = None,
    dense_parameters: Annotated[int | None, option("All parameters that are not of routed experts.", 0)] = None,
    ranks: Annotated[str, option("Ranks, or several numbers of them with commas between.")] = "8,64,1024,10240",
    ranks_per_node: Annotated[int, option("Neighbours with fast links: a node, or an NVLink domain.", 1)] = 8,
    tokens: Annotated[int, option("Tokens of a rank and micro-batch.", 1)] = 4096,
    micro_batches: Annotated[int, option("Micro-batches of a step.", 1)] = 1,
    node_gbytes: Annotated[float, option("GB/s of a rank to its node.")] = 400,
    node_latency_us: Annotated[float, option("Microseconds of a message in a node.", 0)] = 1,
    network_gbytes: Annotated[float, option("GB/s of a rank to other nodes.")] = 45,
    network_latency_us: Annotated[float, option("Microseconds of a message to another node.", 0)] = 2,
    gpu_gbytes: Annotated[float, option("GB of a GPU's memory.")] = 80,
    param_dtype: Annotated[str, option("Of slots, and of weights and tokens on the wire.")] = "bfloat16",
    reduce_dtype: Annotated[str, option("Of gradients on the wire.")] = "bfloat16",
    token_dtype: Annotated[str | None, option("A narrower one of tokens on the wire: as the run's setting.")] = None,
    state_dtype: Annotated[str, option("Of owned parameters, gradients and Adam's moments.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what expert groups of each size cost in bytes, seconds and memory, on paper, and which to use."""
    from swiftmoe_lightning.analysis import Advice, Cluster, Workload, model_of
    from swiftmoe_lightning.analysis.report import scale_table

    with clear_errors("scale"):
        sizes = {"num_layers": layers, "num_experts": experts, "top_k": top_k, "dim": dim, "hidden_dim": hidden_dim}
        known = model_of(model, {**sizes, "dense_parameters": dense_parameters})
        speeds = Cluster(
            num_ranks=1,
            ranks_per_node=ranks_per_node,
            node_bytes=node_gbytes * 1e9,
            node_latency=node_latency_us / 1e6,
            network_bytes=network_gbytes * 1e9,
            network_latency=network_latency_us / 1e6,
            gpu_bytes=gpu_gbytes * 1e9,
        )
        work = Workload(
            tokens=tokens,
            micro_batches=micro_batches,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            token_dtype=token_dtype,
            state_dtype=state_dtype,
        )
        advices = [Advice(known, cluster, work) for cluster in speeds.of_sizes(ranks)]
    if as_json:
        typer.echo(json.dumps(scale_table.as_json(advices), indent=2))
    else:
        scale_table.print_scale(advices)


app.command()(memory)


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A file or folder whose checksums are verified; exit status 1 if it is bad.")
    ] = None,
    timeout: Annotated[float, option("Seconds to wait for ranks, under torchrun.", 0)] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is installed, which devices there are, and which backend each operation runs on them, with the reason.

    Under torchrun, say instead whether its ranks fit together, how fast their links are, and how to mend what is
    wrong; exit status 1 if something is. With CHECKPOINT, say of each of its files whether it is undamaged.
    """
    from swiftmoe_lightning.distributed.launch_facts import is_launched
    from swiftmoe_lightning.doctor import examine, print_checkpoint, print_findings

    is_good = True
    with clear_errors("doctor"):
        if checkpoint is not None:
            is_good = print_checkpoint(checkpoint, as_json)
        elif is_launched():
            is_good = _check_launch(timeout, as_json)
        elif as_json:
            typer.echo(json.dumps(examine(), indent=2))
        else:
            print_findings(examine())
    raise typer.Exit(int(not is_good))


def _check_launch(timeout: float, as_json: bool) -> bool:
    """Whether the ranks fit together; rank 0 tells of them, and a rank that does not meet it of itself."""
    from swiftmoe_lightning.distributed.launch_check import check_launch
    from swiftmoe_lightning.doctor import print_launch

    try:
        with check_launch(timeout) as report:
            if report.rank == 0:
                print_launch(report, as_json)
            return report.is_good
    except ConnectionError as error:
        typer.echo(f"swiftmoe doctor: {error}", err=True)
        return False


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
