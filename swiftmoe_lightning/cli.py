"""The command `swiftmoe`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

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


def _option(text: str, least: float | None = None) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(help=text, min=least)
    return info


@app.command()
def train(  # noqa: PLR0913 - options
    strategy: Annotated[Strategy, _option("Experts replicated by popularity, or static, or both compared.")] = (
        Strategy.both
    ),
    data: Annotated[Path | None, _option("A text file to train on instead of Shakespeare.")] = None,
    steps: Annotated[int, _option("Optimizer steps.", 1)] = DemoOptions.steps,
    ranks: Annotated[int | None, _option("Processes: all GPUs, or 4 on the CPU, by default.", 1)] = None,
    layers: Annotated[int, _option("Transformer layers, each with its own experts.", 1)] = DemoOptions.layers,
    dim: Annotated[int, _option("Width of the model, a multiple of 32.", 1)] = DemoOptions.dim,
    hidden_dim: Annotated[int, _option("Inner width of an expert.", 1)] = DemoOptions.hidden_dim,
    experts: Annotated[int, _option("Experts of a layer.", 1)] = DemoOptions.experts,
    top_k: Annotated[int, _option("Experts that a byte is sent to.", 1)] = DemoOptions.top_k,
    seq_len: Annotated[int, _option("Bytes of a sequence.", 1)] = DemoOptions.seq_len,
    batch_size: Annotated[int, _option("Sequences of a step, all ranks together.", 1)] = DemoOptions.batch_size,
    slots_per_rank: Annotated[
        int | None, _option("Places for experts on a rank; by default twice the need.", 1)
    ] = None,
    capacity_factor: Annotated[float, _option("Token budget over the mean load; 0 drops no token.", 0)] = (
        DemoOptions.capacity_factor
    ),
    aux_loss_coef: Annotated[float, _option("Weight of the load-balancing loss.", 0)] = DemoOptions.aux_loss_coef,
    lr: Annotated[float, _option("Learning rate.", 0)] = DemoOptions.lr,
    seed: Annotated[int, _option("Decides weights and data: runs of one seed can be compared.", 0)] = DemoOptions.seed,
    out: Annotated[
        Path | None, _option("Run folder; files there are written over (default: runs/STRATEGY, or runs).")
    ] = None,
) -> None:
    """Train a small byte-level GPT on real text, with static and with adaptive replicas, and compare the two."""
    # Imported in the function, since `--help` and a mistyped option must not wait for torch.
    from swiftmoe_lightning.demo.both import BothDemos
    from swiftmoe_lightning.demo.run import Demo

    with _clear_errors("train"):
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


_Trace = Annotated[
    Path,
    typer.Argument(help="What PlacementRecorder wrote (.npz, .parquet), or a router trace of Megatron-Core (.jsonl)."),
]
_Ranks = Annotated[int | None, _option("Ranks to plan for (default: the trace's own).", 1)]
_Slots = Annotated[int | None, _option("Slots of a rank (default: the trace's own).", 1)]
_Budget = Annotated[str | None, _option("What has a budget: rank or slot (default: each policy's own).")]
_Lag = Annotated[int, _option("Rows between the step that a plan is made from and the one it serves.", 0)]
_Policies = Annotated[str, _option("Policies, with commas between; 'all' takes every one.")]
_Bytes = Annotated[int, _option("Bytes of one expert's weights; its gradient has as many.", 1)]


@app.command()
def plan(  # noqa: PLR0913 - options
    trace: _Trace,
    ranks: _Ranks = None,
    slots: _Slots = None,
    capacity_factor: Annotated[float | None, _option("Token budget over the mean load (default: dropless).", 0)] = None,
    capacity_per: _Budget = None,
    policies: _Policies = "balanced,packed,symi,static",
    lag: _Lag = 1,
    replace_every: Annotated[str, _option("Steps between two placements, or 'auto'.")] = "1",
    experts_bytes: _Bytes = 1_000_000,
    state_bytes: Annotated[int | None, _option("Bytes of an expert's optimizer state (default: 8 x weights).", 0)] = (
        None
    ),
    link_gbps: Annotated[float | None, _option("Gb/s of a rank's link: with --tflops, models step times.")] = None,
    tflops: Annotated[float | None, _option("TFLOP/s that a rank reaches.")] = None,
    assignment_flops: Annotated[float | None, _option("FLOP of an assignment (default: 3 x weights' bytes).")] = None,
    token_bytes: Annotated[int, _option("Bytes of a token's hidden state, on its way four times a step.", 0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what placement policies would have made of a recorded trace, before any GPU is rented."""
    from swiftmoe_lightning.analysis import Machine, PlanOptions, Sizes, make_plan, read_trace
    from swiftmoe_lightning.analysis.report.plan_table import print_plan

    with _clear_errors("plan"):
        recorded = read_trace(trace)
        sizes = Sizes.of(recorded, ranks, slots, capacity_factor)
        machine = Machine(
            num_ranks=sizes.num_ranks,
            slots_per_rank=sizes.slots_per_rank,
            expert_bytes=experts_bytes,
            state_bytes=state_bytes,
            link_bytes=None if link_gbps is None else link_gbps * 1e9 / 8,
            flops=None if tflops is None else tflops * 1e12,
            assignment_flops=assignment_flops,
            assignment_bytes=token_bytes,
        )
        options = PlanOptions(
            policies=_names(policies),
            capacity_factor=capacity_factor or None,
            capacity_per=capacity_per,
            lag=lag,
            replace_every=int(replace_every) if replace_every.isdigit() else replace_every,
        )
        result = make_plan(recorded, machine, options, None if as_json else _say)
    if as_json:
        typer.echo(json.dumps(result.as_json(), indent=2))
    else:
        print_plan(result)


@app.command()
def report(  # noqa: PLR0913 - options
    run_or_trace: Annotated[Path, typer.Argument(help="A run folder of `swiftmoe train`, or a trace as for `plan`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    ranks: _Ranks = None,
    slots: _Slots = None,
    capacity_factor: Annotated[float | None, _option("Budget over mean load (default: the trace's own).", 0)] = None,
    policies: _Policies = "balanced,symi,static",
    lag: _Lag = 1,
    experts_bytes: _Bytes = 1_000_000,
) -> None:
    """Draw a run or a trace as one page that opens offline: popularity, replicas, drops, imbalance, bytes."""
    from swiftmoe_lightning.analysis import Machine, PlanOptions, Sizes, check_writable, make_plan, read_trace
    from swiftmoe_lightning.analysis.report.page import write_page
    from swiftmoe_lightning.analysis.report.plan_page import plan_page

    with _clear_errors("report"):
        # An error of the path comes before the replays.
        check_writable(out)
        recording = run_or_trace / "placements.npz"
        recorded = read_trace(recording if recording.exists() else run_or_trace)
        sizes = Sizes.of(recorded, ranks, slots, capacity_factor)
        machine = Machine(num_ranks=sizes.num_ranks, slots_per_rank=sizes.slots_per_rank, expert_bytes=experts_bytes)
        options = PlanOptions(policies=_names(policies), capacity_factor=sizes.capacity_factor, lag=lag)
        write_page(out, plan_page(make_plan(recorded, machine, options, _say), title=run_or_trace.name))
    # A file's name may hold bytes that are not Unicode.
    name = os.fsencode(out).decode(errors="replace")
    typer.echo(f"{name}: {out.stat().st_size / 1e6:.1f} MB. Open it in a browser.")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, or PlacementRecorder's file; it may come later.")],
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1 (default: a free one).", min=0, max=65535)] = 0,
) -> None:
    """Show a run's page in a browser of this machine, live while the run goes on, until Ctrl-C."""
    from swiftmoe_lightning.analysis.report.watch import LivePage, PageServer

    with _clear_errors("watch"):
        server = PageServer(LivePage(run), port)
    typer.echo(f"Open {server.url} in a browser. Ctrl-C ends this.")
    server.serve_until_interrupted()


_MODEL_HELP = "A preset (qwen3-30b-a3b, deepseek-v3, mixtral-8x7b, olmoe-1b-7b) or a Hugging Face config.json."


@app.command()
def scale(  # noqa: PLR0913 - options
    model: Annotated[str | None, typer.Argument(help=_MODEL_HELP)] = None,
    layers: Annotated[int | None, _option("MoE layers (default, as of the next four: the model's).", 1)] = None,
    experts: Annotated[int | None, _option("Experts of a layer.", 1)] = None,
    top_k: Annotated[int | None, _option("Experts of a token.", 1)] = None,
    dim: Annotated[int | None, _option("Width of the model.", 1)] = None,
    hidden_dim: Annotated[int | None, _option("Inner width of an expert.", 1)] = None,
    dense_parameters: Annotated[int | None, _option("All parameters that are not of routed experts.", 0)] = None,
    ranks: Annotated[str, _option("Ranks, or several numbers of them with commas between.")] = "8,64,1024,10240",
    ranks_per_node: Annotated[int, _option("Neighbours with fast links: a node, or an NVLink domain.", 1)] = 8,
    tokens: Annotated[int, _option("Tokens of a rank and micro-batch.", 1)] = 4096,
    micro_batches: Annotated[int, _option("Micro-batches of a step.", 1)] = 1,
    node_gbytes: Annotated[float, _option("GB/s of a rank to its node.")] = 400,
    node_latency_us: Annotated[float, _option("Microseconds of a message in a node.", 0)] = 1,
    network_gbytes: Annotated[float, _option("GB/s of a rank to other nodes.")] = 45,
    network_latency_us: Annotated[float, _option("Microseconds of a message to another node.", 0)] = 2,
    gpu_gbytes: Annotated[float, _option("GB of a GPU's memory.")] = 80,
    param_dtype: Annotated[str, _option("Of slots, and of weights and tokens on the wire.")] = "bfloat16",
    reduce_dtype: Annotated[str, _option("Of gradients on the wire.")] = "bfloat16",
    state_dtype: Annotated[str, _option("Of owned parameters, gradients and Adam's moments.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Say what expert groups of each size cost in bytes, seconds and memory, on paper, and which to use."""
    from swiftmoe_lightning.analysis import Advice, Cluster, Workload, model_of
    from swiftmoe_lightning.analysis.report import scale_table

    with _clear_errors("scale"):
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
        dtypes = {"param_dtype": param_dtype, "reduce_dtype": reduce_dtype, "state_dtype": state_dtype}
        work = Workload(tokens=tokens, micro_batches=micro_batches, **dtypes)
        advices = [Advice(known, cluster, work) for cluster in speeds.of_sizes(ranks)]
    if as_json:
        typer.echo(json.dumps(scale_table.as_json(advices), indent=2))
    else:
        scale_table.print_scale(advices)


@app.command()
def doctor(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A file or folder whose checksums are verified; exit status 1 if it is bad.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say what is installed, which devices there are, and which backend each operation runs on them, with the reason.

    With CHECKPOINT, say instead of each of its files whether it is undamaged.
    """
    from swiftmoe_lightning.doctor import examine, print_checkpoint, print_findings

    if checkpoint is not None:
        with _clear_errors("doctor"):
            is_good = print_checkpoint(checkpoint, as_json)
        raise typer.Exit(int(not is_good))
    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
    else:
        print_findings(findings)


def _names(policies: str) -> tuple[str, ...]:
    from swiftmoe_lightning.analysis import CANDIDATES

    return tuple(CANDIDATES) if policies == "all" else tuple(name.strip() for name in policies.split(",") if name)


def _say(policy: str) -> None:
    typer.echo(f"replaying {policy} ...", err=True)


@contextmanager
def _clear_errors(command: str) -> Iterator[None]:
    """End the command with one line at an error that the user can mend."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"swiftmoe {command}: {error}", err=True)
        raise typer.Exit(2) from None


def main() -> None:
    """Entry point of the console script."""
    app()
