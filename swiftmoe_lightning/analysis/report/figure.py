"""Figures of matplotlib, which not everyone has installed."""

from __future__ import annotations

from typing import Any


def new_figure(title: str, width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure`: one of its own, not pyplot's, so it needs no window and no global state.

    Args:
        title: the figure's.
        width: inches.
        height: inches.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    figure = import_figure()(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def import_figure() -> Any:
    """The class `matplotlib.figure.Figure`.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError('the picture needs matplotlib. Run `pip install "swiftmoe-lightning[report]"`.') from missing
    return Figure
