"""The command `swiftmoe`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from swiftmoe_lightning.demo.options import DemoOptions

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


class Strategy(StrEnum):
    """Where experts live."""

    swiftmoe = "swiftmoe"
    static = "static"


@app.callback()
def swiftmoe() -> None:
    """Mixture-of-Experts training with experts replicated by popularity, anew every step."""


def _option(text: str, least: float | None = None) -> typer.models.OptionInfo:
    info: typer.models.OptionInfo = typer.Option(help=text, min=least)
    return info


@app.command()
def train(  # noqa: PLR0913 - options
    strategy: Annotated[Strategy, _option("Replicate experts by popularity, or leave them where they are.")] = (
        Strategy.swiftmoe
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
    slots_per_rank: Annotated[int | None, _option("Places for experts on a rank; by default 5/4 of need.", 1)] = None,
    capacity_factor: Annotated[float, _option("Token budget of a rank over the mean load; 0 drops no token.", 0)] = (
        DemoOptions.capacity_factor
    ),
    aux_loss_coef: Annotated[float, _option("Weight of the load-balancing loss.", 0)] = DemoOptions.aux_loss_coef,
    lr: Annotated[float, _option("Highest learning rate.", 0)] = DemoOptions.lr,
    seed: Annotated[int, _option("Decides weights and data: runs of one seed can be compared.", 0)] = DemoOptions.seed,
    out: Annotated[Path | None, _option("Run folder; files there are written over.  [default: runs/STRATEGY]")] = None,
) -> None:
    """Train a small byte-level GPT on real text, and show what became of its experts."""
    # Here, not above: neither `--help` nor a mistyped option needs it.
    from swiftmoe_lightning.demo.run import Demo

    try:
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
        demo = Demo(options)
    except (ValueError, OSError) as error:
        typer.echo(f"swiftmoe train: {error}", err=True)
        raise typer.Exit(2) from None
    demo.run()


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
