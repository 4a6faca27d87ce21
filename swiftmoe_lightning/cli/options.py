"""What several commands share: options, and how errors are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from swiftmoe_lightning.analysis import Trace


def option(text: str, least: float | None = None) -> typer.models.OptionInfo:
    """An option whose name is its parameter's.

    Args:
        text: for `--help`.
        least: the smallest value that is allowed.
    """
    info: typer.models.OptionInfo = typer.Option(help=text, min=least)
    return info


Ranks = Annotated[int | None, option("Ranks to plan for (default: the trace's own, a scenario's 16).", 1)]
Slots = Annotated[int | None, option("Slots of a rank (default: the trace's own).", 1)]
Lag = Annotated[int, option("Rows between the step that a plan is made from and the one it serves.", 0)]
Policies = Annotated[str, option("Policies, with commas between; 'all' takes every one.")]
_SCENARIOS = "even, zipf, hot, rotating, burst, switch, dying, relaxing, or all"
Scenario = Annotated[str | None, option(f"A synthetic trace instead of TRACE: {_SCENARIOS}.")]
Bytes = Annotated[int, option("Bytes of one expert's weights; its gradient has as many.", 1)]

MODEL_HELP = "A preset (qwen3-30b-a3b, deepseek-v3, mixtral-8x7b, olmoe-1b-7b) or a Hugging Face config.json."


def names(policies: str) -> tuple[str, ...]:
    """The policies that an option names."""
    from swiftmoe_lightning.analysis import CANDIDATES

    return tuple(CANDIDATES) if policies == "all" else tuple(name.strip() for name in policies.split(",") if name)


def traces_of(trace: Path | None, scenario: str | None, **options: int | None) -> dict[str, Trace]:
    """Name -> the trace of a file, or of a scenario, or of "all" of them.

    Args:
        trace: the file.
        scenario: its name; one of the two is None.
        **options: of `ScenarioOptions`; None takes its default.

    Raises:
        ValueError: unless one of the two is given, and for whatever is wrong with it.
    """
    from swiftmoe_lightning.analysis import SCENARIOS, ScenarioOptions, make_scenario, read_trace

    if trace is not None and scenario is None:
        return {trace.name: read_trace(trace)}
    if trace is not None or scenario is None:
        got = "neither" if scenario is None else "both"
        raise ValueError(f"give a TRACE, or --scenario NAME with one of {', '.join(SCENARIOS)}; got {got}.")
    settings = ScenarioOptions(**{name: value for name, value in options.items() if value is not None})
    return {name: make_scenario(name, settings) for name in (SCENARIOS if scenario == "all" else [scenario])}


def only_one(traces: Mapping[str, Trace]) -> Trace:
    """The trace, where there is one.

    Args:
        traces: by name.

    Raises:
        ValueError: where there are more.
    """
    if len(traces) > 1:
        raise ValueError(f"--scenario all is for `swiftmoe plan` without --recommend. Name one of {', '.join(traces)}.")
    return next(iter(traces.values()))


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
