"""Two runs' losses, over steps and over time, as one picture."""

from __future__ import annotations

import math
from pathlib import Path

from swiftmoe_lightning.analysis.report.figure import new_figure
from swiftmoe_lightning.analysis.time_to_loss import Curve, position_of, target_loss


def draw_curves(static: Curve, adaptive: Curve, path: Path, title: str) -> None:
    """Draw the validation loss of both over steps and over time.

    Args:
        static: the run whose replicas stay.
        adaptive: the run whose replicas follow popularity.
        path: the file (.png, .svg, .pdf).
        title: the picture's.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    figure = new_figure(title, 11, 4.2)
    loss = target_loss(1.0, static.steps, static.losses)
    for axis, unit in zip(figure.subplots(1, 2, sharey=True), ("optimizer steps", "seconds of training"), strict=True):
        for curve, colour in ((static, "#b2762f"), (adaptive, "#00429d")):
            positions = curve.steps if unit == "optimizer steps" else curve.seconds
            # The first validation comes before any training, and would flatten the rest.
            axis.plot(positions[1:], curve.losses[1:], color=colour, marker="o", markersize=3, label=curve.label)
            reached = position_of(loss, positions, curve.losses)
            if math.isfinite(reached):
                axis.axvline(reached, color=colour, linewidth=0.8, linestyle=":")
                offset = {"textcoords": "offset points", "xytext": (4, -13)}
                axis.annotate(f"{reached:.0f}", (reached, loss), color=colour, **offset)
        axis.axhline(loss, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss, nats a byte")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
