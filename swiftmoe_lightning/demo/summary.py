"""The numbers of a run, as a table. U steps, W ranks, L layers, E experts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from swiftmoe_lightning.placement import imbalance


def summary_table(
    title: str, recording: Mapping[str, np.ndarray], val_losses: list[float], step_seconds: list[float]
) -> Table:
    """A run's drops, imbalance, losses and step times as a table.

    Args:
        title: the table's.
        recording: arrays of `PlacementRecorder`.
        val_losses: nats a byte, first to last.
        step_seconds: one each step.
    """
    first, last = val_losses[0], val_losses[-1]
    imbalance_U = imbalance(recording["loads"]).mean(1)
    num_last = -(-len(imbalance_U) // 10)
    survival = 1 - recording["dropped"].sum() / recording["counts"].sum()
    table = Table("", "", title=title, show_header=False)
    for name, value in (
        ("validation loss", f"{first:.3f} -> {last:.3f} nats/byte"),
        ("bits per byte", f"{first / math.log(2):.3f} -> {last / math.log(2):.3f}"),
        ("perplexity per byte", f"{math.exp(first):.2f} -> {math.exp(last):.2f}"),
        ("token survival rate", f"{survival:.2%}"),
        ("imbalance, mean of the run", f"{imbalance_U.mean():.3f} (busiest rank / mean rank)"),
        ("imbalance, last 10 % of steps", f"{imbalance_U[-num_last:].mean():.3f}"),
        ("replicas moved per step", f"{recording['moved'].sum(1).mean():.1f} (all layers)"),
        ("step time, median", f"{1000 * np.median(step_seconds):.0f} ms"),
    ):
        table.add_row(name, value)
    return table
