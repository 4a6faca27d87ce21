"""A sweep as one picture: what more slots buy, what they cost, and the knee."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from swiftmoe_lightning.analysis.recommend import Recommendation
from swiftmoe_lightning.analysis.report.figure import new_figure
from swiftmoe_lightning.analysis.sweep import Point


def draw_sweep(points: Sequence[Point], best: Recommendation, path: Path, title: str) -> None:
    """Draw imbalance, drops and bytes over the slots of a rank into a file, with the recommended ones marked.

    Args:
        points: of the sweep. Imbalance and bytes have a line for each group size, drops one for each capacity factor in
            groups of the recommended size.
        best: what is marked.
        path: the file (.png, .svg, .pdf).
        title: the picture's.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    figure = new_figure(title, 13, 4)
    balance, drops, sent = figure.subplots(1, 3)
    chosen = best.point
    for size in dict.fromkeys(point.group_size for point in points):
        same_group = [point for point in points if point.group_size == size]
        slots = [point.slots_per_rank for point in same_group]
        line = {
            "marker": "o",
            "markersize": 4,
            "label": f"groups of {size}",
            "alpha": 1 if size == chosen.group_size else 0.5,
        }
        balance.plot(slots, [point.imbalance for point in same_group], **line)
        sent.plot(slots, [point.sent_bytes / 1e6 for point in same_group], **line)
    same_group = [point for point in points if point.group_size == chosen.group_size]
    slots = [point.slots_per_rank for point in same_group]
    for factor in chosen.dropped:
        shares = [100 * point.dropped[factor] for point in same_group]
        drops.plot(slots, shares, marker="o", markersize=4, label=f"capacity factor {factor:g}")
    drops.axhline(100 * best.most_dropped, color="0.5", linewidth=0.8, linestyle="--")
    for axis, value, name in (
        (balance, chosen.imbalance, "imbalance: busiest rank / mean rank"),
        (drops, 100 * chosen.dropped[best.capacity_factor or min(chosen.dropped)], "dropped assignments, %"),
        (sent, chosen.sent_bytes / 1e6, "MB a rank sends a step, both weight phases"),
    ):
        axis.axvline(chosen.slots_per_rank, color="0.2", linewidth=0.8, linestyle=":")
        axis.plot([chosen.slots_per_rank], [value], "*", color="#c1272d", markersize=15, zorder=3, label="recommended")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("slots of a rank")
        # Groups of half the size have twice the slots.
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({point.slots_per_rank for point in (same_group if axis is drops else best.knees)}))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, frameon=False)
    # Few drops and small differences show beside many and large ones.
    balance.set_yscale("log")
    drops.set_yscale("symlog", linthresh=1)
    drops.set_ylim(bottom=0)
    for axis in (balance, drops):
        axis.yaxis.set_major_formatter("{x:g}")
    balance.yaxis.set_minor_formatter("{x:g}")
    figure.savefig(path, dpi=130)
