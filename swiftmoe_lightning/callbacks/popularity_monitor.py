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

from swiftmoe_lightning.config import is_number
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

    Args:
        max_keys: logs no more keys than this. Left out first, layer by layer from the last one, are the keys of single
            experts, then those of layers.

    Raises:
        ValueError: for max_keys below 12.
    """

    def __init__(self, max_keys: int = 500) -> None:
        if not (is_number(max_keys) and max_keys >= _NUM_ALWAYS):
            raise ValueError(f"max_keys must be {_NUM_ALWAYS} or more, got {max_keys!r}.")
        self.max_keys = max_keys
        self._reader: LoadReader | None = None
        self._window = _Window([], [])
        self._step = 0
        self._token_bytes: dict[str, int] = {}

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

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self._step or self._reader is None:
            return
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        due = trainer.global_step // interval > self._step // interval
        self._step = trainer.global_step
        loads = self._reader.read()
        self._window.add(loads)
        trainer.callback_metrics.update({f"moe/{k}": torch.tensor(v) for k, v in _totals(loads.values()).items()})
        if due:
            self._flush(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)

    def _flush(self, trainer: Trainer) -> None:
        if values := self._window.take():
            assert self._reader is not None
            before, self._token_bytes = self._token_bytes, self._reader.token_bytes
            values |= {f"moe/{key}": float(self._token_bytes[link] - before[link]) for link, key in _LINKS.items()}
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)


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
