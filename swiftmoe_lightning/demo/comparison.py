"""Two runs of one model side by side: what adaptive replicas save to the loss that static ones end with.

V validations, U steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swiftmoe_lightning.analysis.time_to_loss import position_of, saved, target_loss


@dataclass(frozen=True, eq=False)
class Curve:
    """What a run reached, and when.

    Attributes:
        label: the strategy.
        steps: [V] optimizer steps done before each validation.
        seconds: [V] spent in them, without validations.
        losses: [V] nats a byte.
        dropped: share of all assignments that were over capacity.
    """

    label: str
    steps: list[int]
    seconds: list[float]
    losses: list[float]
    dropped: float


def describe(static: Curve, adaptive: Curve) -> str:
    """One sentence: steps and time to the loss that static ends with, and what was dropped.

    Args:
        static: the run whose replicas stay.
        adaptive: the run whose replicas follow popularity.
    """
    loss = target_loss(1.0, static.steps, static.losses)
    drops = f"dropped {adaptive.dropped:.1%} of the tokens' expert assignments instead of {static.dropped:.1%}"
    steps = position_of(loss, adaptive.steps, adaptive.losses)
    if not np.isfinite(steps):
        return f"{adaptive.label} {drops}, and did not reach the loss of {loss:.3f} that {static.label} ended with."
    steps_saved = saved(steps, position_of(loss, static.steps, static.losses))
    seconds = position_of(loss, adaptive.seconds, adaptive.losses)
    time_saved = saved(seconds, position_of(loss, static.seconds, static.losses))
    return (
        f"{adaptive.label} reached the loss of {loss:.3f} that {static.label} ended with in {_less(steps_saved)} steps "
        f"and {_less(time_saved)} time: it {drops}."
    )


def _less(share: float) -> str:
    return f"{share:.0%} less" if share >= 0 else f"{-share:.0%} more"


def draw_comparison(static: Curve, adaptive: Curve, path: Path, title: str) -> None:
    """Draw the validation loss of both over steps and over time.

    Args:
        static: the run whose replicas stay.
        adaptive: the run whose replicas follow popularity.
        path: the file (.png, .svg, .pdf).
        title: the picture's.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            'the picture needs matplotlib. Run `pip install "swiftmoe-lightning[report]"`, or `pip install matplotlib`.'
        ) from missing
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(title)
    loss = target_loss(1.0, static.steps, static.losses)
    for axis, unit in zip(figure.subplots(1, 2, sharey=True), ("optimizer steps", "seconds of training"), strict=True):
        for curve, colour in ((static, "#b2762f"), (adaptive, "#00429d")):
            positions = curve.steps if unit == "optimizer steps" else curve.seconds
            # The first validation comes before any training, and would flatten the rest.
            axis.plot(positions[1:], curve.losses[1:], color=colour, marker="o", markersize=3, label=curve.label)
            reached = position_of(loss, positions, curve.losses)
            if np.isfinite(reached):
                axis.plot([reached] * 2, [axis.get_ylim()[0], loss], color=colour, linewidth=0.8, linestyle=":")
                axis.annotate(
                    f"{reached:.0f}", (reached, loss), textcoords="offset points", xytext=(4, 6), color=colour
                )
        axis.axhline(loss, color="0.5", linewidth=0.8, linestyle="--")
        axis.set_xlabel(unit)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss, nats a byte")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
