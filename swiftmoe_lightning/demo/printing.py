"""What the demo prints besides its progress, and whether it draws."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from swiftmoe_lightning.analysis.report.figure import import_figure
from swiftmoe_lightning.analysis.report.page_text import path_text
from swiftmoe_lightning.demo.summary import summary_table


@rank_zero_only
def tell_if_nothing_is_drawn() -> None:
    """Without matplotlib, print what to install."""
    try:
        import_figure()
    except ImportError as missing:
        Console().print(f"No picture: {missing}", markup=False)


def draw_if_possible(path: Path, draw: Callable[[Path], None]) -> list[str]:
    """Draw a picture, if matplotlib is installed.

    Args:
        path: the picture's file.
        draw: draws to it.

    Returns:
        The names of the files that were written.
    """
    try:
        draw(path)
    except ImportError:
        return []
    return [path.name]


def print_outcome(title: str, runs: Mapping[str, Mapping[str, str]], folder: Path, files: list[str]) -> None:
    """Print a table of runs, and where the files are.

    Args:
        title: the table's.
        runs: label -> its rows.
        folder: where the files are.
        files: their names.
    """
    console = Console()
    console.print(summary_table(title, runs))
    console.print(f"Files: {path_text(folder)}/ ({', '.join(files)})", soft_wrap=True, markup=False)


def print_next(run_folder: Path) -> None:
    """Print what to do with a run.

    Args:
        run_folder: of one run.
    """
    folder = shlex.quote(path_text(run_folder))
    console = Console()
    console.print(f"Look closer:  swiftmoe report {folder}", soft_wrap=True, markup=False)
    console.print(f"Choose slots: swiftmoe plan {folder}/placements.npz --recommend", soft_wrap=True, markup=False)
