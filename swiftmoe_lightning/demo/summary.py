"""The numbers of a run, as a table. U steps, W ranks, L layers, E experts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from rich.table import Table

from swiftmoe_lightning.placement import imbalance


def dropped_share(recording: Mapping[str, np.ndarray]) -> float:
    """Share of a run's assignments that were over capacity.

    Args:
        recording: arrays of `PlacementRecorder`.
    """
    return float(recording["dropped"].sum() / recording["counts"].sum())


def summary_rows(
    recording: Mapping[str, np.ndarray], val_losses: list[float], step_seconds: list[float]
) -> dict[str, str]:
    """A run's losses, drops, imbalance and step times, by name.

    Args:
        recording: arrays of `PlacementRecorder`.
        val_losses: nats a byte, first to last.
        step_seconds: one each step.
    """
    first, last = val_losses[0], val_losses[-1]
    imbalance_U = imbalance(recording["loads"]).mean(1)
    num_last = -(-len(imbalance_U) // 10)
    return {
        "validation loss, nats a byte": f"{first:.3f} -> {last:.3f}",
        "bits a byte": f"{first / math.log(2):.3f} -> {last / math.log(2):.3f}",
        "perplexity of a byte": f"{math.exp(first):.2f} -> {math.exp(last):.2f}",
        "token survival rate": f"{1 - dropped_share(recording):.2%}",
        "imbalance (busiest rank / mean rank)": f"{imbalance_U.mean():.3f}",
        "imbalance, last 10 % of steps": f"{imbalance_U[-num_last:].mean():.3f}",
        "replicas moved per step, all layers": f"{recording['moved'].sum(1).mean():.1f}",
        "step time, median": f"{1000 * np.median(step_seconds):.0f} ms",
    }


def summary_table(title: str, runs: Mapping[str, Mapping[str, str]]) -> Table:
    """A column a run, a row a number.

    Args:
        title: the table's.
        runs: label -> what `summary_rows` gave; of all runs alike.
    """
    table = Table("", *runs, title=title)
    for name in next(iter(runs.values())):
        table.add_row(name, *(rows[name] for rows in runs.values()))
    return table
