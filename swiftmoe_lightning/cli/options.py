"""What several commands share: options, and how errors are shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer


def option(text: str, least: float | None = None) -> typer.models.OptionInfo:
    """An option whose name is its parameter's.

    Args:
        text: for `--help`.
        least: the smallest value that is allowed.
    """
    info: typer.models.OptionInfo = typer.Option(help=text, min=least)
    return info


Ranks = Annotated[int | None, option("Ranks to plan for (default: the trace's own).", 1)]
Slots = Annotated[int | None, option("Slots of a rank (default: the trace's own).", 1)]
Lag = Annotated[int, option("Rows between the step that a plan is made from and the one it serves.", 0)]
Policies = Annotated[str, option("Policies, with commas between; 'all' takes every one.")]
Bytes = Annotated[int, option("Bytes of one expert's weights; its gradient has as many.", 1)]


def names(policies: str) -> tuple[str, ...]:
    """The policies that an option names."""
    from swiftmoe_lightning.analysis import CANDIDATES

    return tuple(CANDIDATES) if policies == "all" else tuple(name.strip() for name in policies.split(",") if name)


def say(what: str) -> None:
    """Tell on standard error what is replayed next."""
    typer.echo(f"replaying {what} ...", err=True)


@contextmanager
def clear_errors(command: str) -> Iterator[None]:
    """End the command with one line at an error that the user can mend."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"swiftmoe {command}: {error}", err=True)
        raise typer.Exit(2) from None
