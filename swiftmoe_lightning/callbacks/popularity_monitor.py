"""Logs the popularity, replicas and drops of every MoE layer. E experts of a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from swiftmoe_lightning.analysis.report.figure import import_figure
from swiftmoe_lightning.callbacks.heat_maps import HeatMaps
from swiftmoe_lightning.callbacks.loggers import lay_out, log_figures, log_image, takes_images
from swiftmoe_lightning.config import check_whole, is_number
from swiftmoe_lightning.modules import LayerLoad, LoadReader
from swiftmoe_lightning.placement import CAUSES

_TOTALS: Final = (
    "imbalance",
    "imbalance_max",
    "token_survival_rate",
    "num_dropped_tokens",
    "num_replicas_moved",
)
# What `LoadReader.token_bytes` counts -> key.
_LINKS: Final = {"inside": "token_bytes_inside_nodes", "between": "token_bytes_between_nodes"}
_NUM_ALWAYS: Final = len(_TOTALS) + len(CAUSES) + len(_LINKS)


class ExpertPopularityMonitor(Callback):
    """Logs popularity, replicas, imbalance, survival and drops to every logger of the Trainer.

    Works with any strategy; under `strategy="swiftmoe"` the numbers are those of all ranks. Every `log_every_n_steps`
    optimizer steps of the Trainer it logs what the steps since the last time added up to. Keys:

    `moe/imbalance`                     largest load of a rank over the mean load; mean over layers and steps
    `moe/imbalance_max`                 the same, the largest of all layers and steps
    `moe/token_survival_rate`           share of assignments that were computed, 0..1
    `moe/num_dropped_tokens`            assignments over capacity, sum over layers and steps
    `moe/num_replicas_moved`            (rank, expert) pairs that were not there a step before, sum
    `moe/<layer>/...`                   the same five, of one layer
    `moe/lost/<cause>`                  what the last of these steps lost to each cause, mean over layers: in a layer
                                        with a capacity the share of assignments dropped, else imbalance. Causes
                                        are `split`, `placement`, `prediction`, `floor` (of one replica an expert) and
                                        `rounding` (replicas are whole); see `placement.Bounds`
    `moe/token_bytes_inside_nodes`      bytes of tokens, forward and backward, validation too, that the logging rank has
                                        sent to other ranks of its node since the last log, all layers
    `moe/token_bytes_between_nodes`     the same, to other nodes
    `moe/<layer>/popularity/<expert>`   share of the layer's assignments, 0..1; balanced is 1/E
    `moe/<layer>/replicas/<expert>`     slots of the expert in the last of these steps

    `<layer>` is the name of the layer's `Experts` module. The first five are also in `trainer.callback_metrics` after
    every step, for that step, so that EarlyStopping or ModelCheckpoint can watch them.

    The progress bar shows the `imbalance` of the last step, and its `survival` if any layer has a capacity. TensorBoard
    gets a page of charts ("Custom Scalars"), Weights & Biases the steps as an axis and what its table of runs shows.

    Args:
        max_keys: logs no more keys than this. Left out first, layer by layer from the last one, are the keys of single
            experts, then those of layers.
        heatmap_every_n_steps: sends TensorBoard, Weights & Biases and MLflow two images every so many optimizer steps,
            `moe/heatmap/popularity` and `moe/heatmap/replicas`, of all steps so far: experts of up to 6 layers down,
            steps across, in up to 400 columns. After 100 images they come half as often, and so on. None sends none.

    Raises:
        ImportError: for heatmap_every_n_steps without matplotlib.
        ValueError: for max_keys below 12, or heatmap_every_n_steps below 1.
    """

    def __init__(self, max_keys: int = 500, heatmap_every_n_steps: int | None = None) -> None:
        if not (is_number(max_keys) and max_keys >= _NUM_ALWAYS):
            raise ValueError(f"max_keys must be {_NUM_ALWAYS} or more, got {max_keys!r}.")
        if heatmap_every_n_steps is not None:
            check_whole(heatmap_every_n_steps=heatmap_every_n_steps)
            # A missing library is an error now, not in the middle of the training.
            import_figure()
        self.max_keys, self.heatmap_every_n_steps = max_keys, heatmap_every_n_steps
        self._reader: LoadReader | None = None
        self._window = _Window([], [])
        self._step = 0
        self._token_bytes: dict[str, int] = {}
        self._heat_maps: HeatMaps | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reader = LoadReader(pl_module)
        self._token_bytes = self._reader.token_bytes
        self._step = trainer.global_step
        sizes = self._reader.num_experts
        room = self.max_keys - _NUM_ALWAYS
        layers = list(sizes)[: room // len(_TOTALS)]
        room -= len(_TOTALS) * len(layers)
        detailed = []
        for name in layers:
            if (room := room - 2 * sizes[name]) < 0:
                break
            detailed.append(name)
        if len(detailed) < len(sizes):
            rank_zero_warn(
                f"ExpertPopularityMonitor logs single experts of {len(detailed)} and totals of {len(layers)} of the "
                f"{len(sizes)} MoE layers, to stay within max_keys={self.max_keys}. Raise max_keys to see all."
            )
        self._window = _Window(layers, detailed)
        self._start_logging(trainer, sizes)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step or self._reader is None:
            return
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = trainer.global_step // interval > self._step // interval
        self._step = trainer.global_step
        loads = self._reader.read()
        self._window.add(loads)
        totals = _totals(loads.values())
        trainer.callback_metrics.update({f"moe/{key}": torch.tensor(value) for key, value in totals.items()})
        if trainer.progress_bar_callback is not None:
            # Numbers of the host: `log(..., prog_bar=True)` would send them to the device, and wait to have them back.
            trainer.progress_bar_metrics.update(_shown(loads, totals))
        if due:
            self._flush(trainer)
        if self._heat_maps is not None:
            self._heat_maps.add(self._step, loads)
            if self._heat_maps.is_due:
                self._send_heat_maps(trainer, self._heat_maps)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)
        if self._heat_maps is not None and self._heat_maps.is_behind:
            self._send_heat_maps(trainer, self._heat_maps)

    def _flush(self, trainer: Trainer) -> None:
        if values := self._window.take():
            assert self._reader is not None
            before, self._token_bytes = self._token_bytes, self._reader.token_bytes
            values |= {f"moe/{key}": float(self._token_bytes[link] - before[link]) for link, key in _LINKS.items()}
            for logger in trainer.loggers:
                log_figures(logger, values, trainer.global_step)

    def _start_logging(self, trainer: Trainer, num_experts: dict[str, int]) -> None:
        """Lay out the loggers' pages and begin the heat maps: on rank 0, as the numbers are the same on all."""
        self._heat_maps = None
        if not trainer.is_global_zero or not num_experts:
            return
        for logger in trainer.loggers:
            lay_out(logger)
        if self.heatmap_every_n_steps is None:
            return
        if not any(takes_images(logger) for logger in trainer.loggers):
            rank_zero_warn(
                "ExpertPopularityMonitor draws no heat maps, as no logger of the Trainer takes images. Add a "
                "TensorBoardLogger, WandbLogger or MLFlowLogger, or leave heatmap_every_n_steps out."
            )
            return
        self._heat_maps = HeatMaps(self.heatmap_every_n_steps, num_experts)

    def _send_heat_maps(self, trainer: Trainer, heat_maps: HeatMaps) -> None:
        for what, image in heat_maps.draw().items():
            for logger in filter(takes_images, trainer.loggers):
                log_image(logger, f"moe/heatmap/{what}", image, trainer.global_step)


def _totals(loads: Iterable[LayerLoad]) -> dict[str, float]:
    """The five totals over these loads, of any layers and steps; empty without loads."""
    loads = list(loads)
    if not loads:
        return {}
    imbalances = [load.imbalance for load in loads]
    num_dropped = sum(load.num_dropped_tokens for load in loads)
    values = (
        float(np.mean(imbalances)),
        max(imbalances),
        1.0 - num_dropped / sum(load.num_assignments for load in loads),
        float(num_dropped),
        float(sum(load.num_moved for load in loads)),
    )
    return dict(zip(_TOTALS, values, strict=True))


def _shown(loads: dict[str, LayerLoad], totals: dict[str, float]) -> dict[str, float]:
    """What the progress bar shows of a step: in a dropless model survival is 1, and left out."""
    shown = {"imbalance": totals["imbalance"]} if totals else {}
    if any(load.capacity is not None for load in loads.values()):
        shown["survival"] = totals["token_survival_rate"]
    return shown


class _Window:
    """The loads since the last log.

    Args:
        layers: names of the layers that have keys of their own.
        detailed: names of the layers whose experts have keys of their own.
    """

    def __init__(self, layers: list[str], detailed: list[str]) -> None:
        self._layers, self._detailed = layers, detailed
        self._loads: dict[str, list[LayerLoad]] = defaultdict(list)

    def add(self, loads: dict[str, LayerLoad]) -> None:
        for name, load in loads.items():
            self._loads[name].append(load)

    def take(self) -> dict[str, float]:
        """Key -> value since the last call."""
        loads, self._loads = self._loads, defaultdict(list)
        values = {f"moe/{k}": v for k, v in _totals(chain.from_iterable(loads.values())).items()}
        if losses := [layer_loads[-1].bounds.losses for layer_loads in loads.values() if layer_loads]:
            values |= {f"moe/lost/{cause}": float(np.mean([each[cause] for each in losses])) for cause in CAUSES}
        for name in self._layers:
            values |= {f"moe/{name}/{k}": v for k, v in _totals(loads[name]).items()}
        for name in self._detailed:
            if not loads[name]:
                continue
            popularity_E = np.sum([load.popularity_E for load in loads[name]], axis=0)
            columns = {
                "popularity": popularity_E / popularity_E.sum(),
                "replicas": loads[name][-1].replica_counts_E,
            }
            for column, values_E in columns.items():
                values |= {f"moe/{name}/{column}/{e}": float(v) for e, v in enumerate(values_E)}
        return values
