"""The command line of every benchmark: its docstring as help, and integers that say how much to measure."""

from __future__ import annotations

import argparse
from argparse import ArgumentParser, Namespace
from dataclasses import field, fields
from typing import Any, TypeVar

Settings = TypeVar("Settings")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written; defaults behind each option."""


def command_line(benchmark: str, description: str | None) -> ArgumentParser:
    """A parser with the one option that every benchmark has, the name of its result.

    Args:
        benchmark: name of the folder in benchmarks/, and of the result unless the user gives another.
        description: what is measured, in which units, against what, and what is written: the docstring of `__main__`.
    """
    parser = ArgumentParser(
        prog=f"python -m benchmarks.{benchmark}", description=description, formatter_class=_Formatter
    )
    parser.add_argument("--name", default=benchmark, help="the result is written to benchmarks/results/NAME.json")
    return parser


def setting(default: int, help: str) -> Any:
    """A field of a dataclass of integers that `add_settings` makes an option of."""
    return field(default=default, metadata={"help": help})


def add_settings(parser: ArgumentParser, *settings: type) -> None:
    """An option for each field of dataclasses whose fields are made by `setting`."""
    for cls in settings:
        for option in fields(cls):
            flag = "--" + option.name.replace("_", "-")
            parser.add_argument(flag, type=int, default=option.default, help=option.metadata["help"])


def settings_of(arguments: Namespace, cls: type[Settings]) -> Settings:
    """The dataclass with what the user gave."""
    return cls(**{option.name: getattr(arguments, option.name) for option in fields(cls)})  # type: ignore[arg-type]
