"""A recorded run as one picture. U steps, W ranks, L layers, E experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from swiftmoe_lightning.analysis.report.figure import new_figure
from swiftmoe_lightning.placement import imbalance

_MOST_LAYERS: Final = 6
_MOST_COLOURS: Final = 12


def draw_picture(recording: Mapping[str, np.ndarray], path: str | Path, title: str) -> None:
    """Draw popularity, replicas, imbalance and drops over the steps into a file.

    Args:
        recording: the arrays that `PlacementRecorder` writes. Of more than 6 layers, 6 are shown, first to last.
        path: the file (.png, .svg, .pdf).
        title: the picture's.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    num_layers = recording["replicas"].shape[1]
    shown = np.unique(np.linspace(0, num_layers - 1, min(num_layers, _MOST_LAYERS)).round().astype(int))
    figure = new_figure(title, 11, 2.6 + 1.6 * len(shown))
    heights = [1.0] * len(shown) + [1.3]
    axes = figure.subplots(len(shown) + 1, 2, sharex=True, height_ratios=heights, squeeze=False)
    _draw_popularity(figure, axes[:-1, 0], recording, shown)
    _draw_replicas(figure, axes[:-1, 1], recording, shown)
    _draw_lines(axes[-1], recording)
    figure.savefig(path, dpi=130)


def _draw_popularity(figure: Any, axes: np.ndarray, recording: Mapping[str, np.ndarray], shown: np.ndarray) -> None:
    from matplotlib.colors import PowerNorm

    popularity_ULE = recording["counts"].sum(1)
    share_ULE = popularity_ULE / np.maximum(popularity_ULE.mean(-1, keepdims=True), 1e-9)
    most = max(float(np.quantile(share_ULE, 0.99)), 1.0)
    # On the scale of the square root both the peaks of a collapsed router and small differences can be seen.
    colours = {"cmap": "cividis", "norm": PowerNorm(0.5, 0, most)}
    image = _draw_heat_maps(axes, share_ULE, "popularity", recording, shown, **colours)
    ticks = [0, *(2**i for i in range(10) if 2**i <= most)]
    figure.colorbar(image, ax=axes, label="popularity, 1 = balanced", extend="max", ticks=ticks)


def _draw_replicas(figure: Any, axes: np.ndarray, recording: Mapping[str, np.ndarray], shown: np.ndarray) -> None:
    from matplotlib.colors import BoundaryNorm, Normalize

    replicas_ULE = recording["replicas"]
    most = max(int(replicas_ULE.max()), 1)
    few = most <= _MOST_COLOURS
    norm = BoundaryNorm(np.arange(0.5, most + 1), 256) if few else Normalize(0, most)
    image = _draw_heat_maps(axes, replicas_ULE, "replicas", recording, shown, cmap="viridis", norm=norm)
    bar = figure.colorbar(image, ax=axes, label="replicas", ticks=range(1, most + 1) if few else None)
    bar.minorticks_off()


def _draw_heat_maps(
    axes: np.ndarray,
    values_ULE: np.ndarray,
    what: str,
    recording: Mapping[str, np.ndarray],
    shown: np.ndarray,
    **colours: Any,
) -> Any:
    """One map below the other: a map for each layer, a line for each expert, a column for each step."""
    names = json.loads(str(recording["metadata"]))["layers"]
    steps_U = recording["step"]
    extent = (steps_U[0] - 0.5, steps_U[-1] + 0.5, values_ULE.shape[-1] - 0.5, -0.5)
    for axis, layer in zip(axes, shown, strict=True):
        image = axis.imshow(values_ULE[:, layer].T, aspect="auto", interpolation="nearest", extent=extent, **colours)
        axis.set_title(f"{what}, {names[layer]}", fontsize=9)
        axis.set_ylabel("expert")
        axis.yaxis.get_major_locator().set_params(integer=True)
    return image


def _draw_lines(axes: np.ndarray, recording: Mapping[str, np.ndarray]) -> None:
    """Draw the imbalance of the ranks' loads on the left and drops on the right; thin lines are single layers."""
    dropped_UL = 100 * recording["dropped"] / np.maximum(recording["counts"].sum((1, 3)), 1)
    for axis, values_UL, title in (
        (axes[0], imbalance(recording["loads"]), "imbalance: load of the busiest rank / mean rank"),
        (axes[1], dropped_UL, "dropped assignments, %"),
    ):
        axis.plot(recording["step"], values_UL, color="#8da0b6", linewidth=0.6)[0].set_label("one layer")
        axis.plot(recording["step"], values_UL.mean(1), color="#00224e", linewidth=1.6, label="mean of all layers")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimizer step")
        axis.set_ylim(bottom=1 if axis is axes[0] else 0)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper right", fontsize=8, frameon=False)
