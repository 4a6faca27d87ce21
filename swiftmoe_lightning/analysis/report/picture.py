"""A recorded run as one picture, or as heat maps. U steps, W ranks, L layers, E experts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from swiftmoe_lightning.analysis.report.figure import new_figure
from swiftmoe_lightning.placement import imbalance

_MOST_LAYERS: Final = 6
_MOST_COLOURS: Final = 12

T = TypeVar("T")


def draw_picture(recording: Mapping[str, np.ndarray], path: str | Path, title: str) -> None:
    """Draw popularity, replicas, imbalance and drops over the steps into a file.

    Args:
        recording: the arrays that `PlacementRecorder` writes. Of more than 6 layers, 6 are shown, first to last.
        path: the file (.png, .svg, .pdf).
        title: the picture's.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    names = json.loads(str(recording["metadata"]))["layers"]
    shown = spread_out(list(enumerate(names)))
    popularity_ULE = recording["counts"].sum(1)
    share_ULE = popularity_ULE / np.maximum(popularity_ULE.mean(-1, keepdims=True), 1e-9)
    figure = new_figure(title, 11, 2.6 + 1.6 * len(shown))
    heights = [1.0] * len(shown) + [1.3]
    axes = figure.subplots(len(shown) + 1, 2, sharex=True, height_ratios=heights, squeeze=False)
    for column, (what, values_ULE) in enumerate((("popularity", share_ULE), ("replicas", recording["replicas"]))):
        maps = {name: values_ULE[:, layer] for layer, name in shown}
        _DRAW[what](figure, axes[:-1, column], maps, recording["step"])
    _draw_lines(axes[-1], recording)
    figure.savefig(path, dpi=130)


def heat_map_image(what: str, maps: Mapping[str, np.ndarray], step_U: np.ndarray) -> np.ndarray:
    """Draw heat maps of a few layers, one below the other.

    Args:
        what: "popularity" or "replicas".
        maps: layer -> [U, E]; popularity in mean popularities, so that 1 is balanced.
        step_U: [U] the step of each column, or its first, at even distances.

    Returns:
        [height, width, 3] uint8; 800 wide, and 120 high a layer.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    figure = new_figure("", 8, 0.5 + 1.2 * len(maps))
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes = figure.subplots(len(maps), 1, sharex=True, squeeze=False)[:, 0]
    _DRAW[what](figure, axes, maps, step_U)
    axes[-1].set_xlabel("optimizer step")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def spread_out(layers: Sequence[T]) -> list[T]:
    """At most 6 of them, evenly from the first to the last.

    Args:
        layers: in their order.
    """
    chosen = np.linspace(0, len(layers) - 1, min(len(layers), _MOST_LAYERS)).round().astype(int)
    return [layers[index] for index in chosen]


def _draw_popularity(figure: Any, axes: np.ndarray, maps: Mapping[str, np.ndarray], step_U: np.ndarray) -> None:
    from matplotlib.colors import PowerNorm

    most = max(float(np.quantile(np.concatenate([share_UE.ravel() for share_UE in maps.values()]), 0.99)), 1.0)
    # On the scale of the square root both the peaks of a collapsed router and small differences can be seen.
    colours = {"cmap": "cividis", "norm": PowerNorm(0.5, 0, most)}
    image = _draw_heat_maps(axes, "popularity", maps, step_U, **colours)
    ticks = [0, *(2**i for i in range(10) if 2**i <= most)]
    figure.colorbar(image, ax=axes, label="popularity, 1 = balanced", extend="max", ticks=ticks)


def _draw_replicas(figure: Any, axes: np.ndarray, maps: Mapping[str, np.ndarray], step_U: np.ndarray) -> None:
    from matplotlib.colors import BoundaryNorm, Normalize

    most = max(*(int(np.ceil(replicas_UE.max())) for replicas_UE in maps.values()), 1)
    few = most <= _MOST_COLOURS
    norm = BoundaryNorm(np.arange(0.5, most + 1), 256) if few else Normalize(0, most)
    image = _draw_heat_maps(axes, "replicas", maps, step_U, cmap="viridis", norm=norm)
    bar = figure.colorbar(image, ax=axes, label="replicas", ticks=range(1, most + 1) if few else None)
    bar.minorticks_off()


_DRAW: Final = {"popularity": _draw_popularity, "replicas": _draw_replicas}


def _draw_heat_maps(
    axes: np.ndarray, what: str, maps: Mapping[str, np.ndarray], step_U: np.ndarray, **colours: Any
) -> Any:
    """One map below the other: a map for each layer, a line for each expert, a column for each step."""
    distance = (step_U[-1] - step_U[0]) / max(len(step_U) - 1, 1) or 1
    for axis, (name, values_UE) in zip(axes, maps.items(), strict=True):
        extent = (step_U[0] - 0.5, step_U[-1] + distance - 0.5, values_UE.shape[1] - 0.5, -0.5)
        image = axis.imshow(values_UE.T, aspect="auto", interpolation="nearest", extent=extent, **colours)
        axis.set_title(f"{what}, {name}", fontsize=9)
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
