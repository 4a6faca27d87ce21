"""What a logger gets besides plain figures: a layout, images, and names that it accepts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from typing import Final

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from swiftmoe_lightning.placement import CAUSES

# Charts, in their order, and the figures in each. Those of layers are patterns, as TensorBoard matches them.
_CHARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "survival": ("token_survival_rate",),
    "imbalance": ("imbalance", "imbalance_max"),
    "lost to": tuple(f"lost/{cause}" for cause in CAUSES),
    "survival of each layer": (".+/token_survival_rate",),
    "imbalance of each layer": (".+/imbalance",),
    "replicas moved": ("num_replicas_moved",),
    "bytes of tokens": ("token_bytes_inside_nodes", "token_bytes_between_nodes"),
}
# What a table of Weights & Biases' runs shows of a figure: without this, its last value.
_SUMMARIES: Final[Mapping[str, str]] = {
    "token_survival_rate": "min,mean,last",
    "imbalance": "mean,last",
    "imbalance_max": "max,last",
}
# The most that one request may hold: mlflow.utils.validation.MAX_METRICS_PER_BATCH.
_MLFLOW_BATCH: Final = 1000


def lay_out(logger: Logger) -> None:
    """Tell the logger how to show the monitor's figures, before the first of them. On rank 0.

    Args:
        logger: TensorBoard gets a page of charts ("Custom Scalars"), Weights & Biases the step as the figures' axis and
            what its table of runs shows of them, others nothing.
    """
    if isinstance(logger, TensorBoardLogger):
        # Tags are matched from their start, and Lightning puts a logger's prefix before them.
        charts = {
            title: ["Multiline", [rf"(.*-)?moe/{figure}$" for figure in figures]] for title, figures in _CHARTS.items()
        }
        logger.experiment.add_custom_scalars({"MoE": charts})
    elif isinstance(logger, WandbLogger):
        for figure, summary in _SUMMARIES.items():
            # The axis that Lightning gives all other metrics: a definition of its own replaces that one.
            logger.experiment.define_metric(f"moe/{figure}", step_metric="trainer/global_step", summary=summary)


def log_figures(logger: Logger, figures: Mapping[str, float], step: int) -> None:
    """Log them under names and in portions that the logger accepts.

    Args:
        logger: for MLflow, characters other than letters, digits, spaces and `_ / . -` become `_`.
        figures: key -> value.
        step: the Trainer's global step.
    """
    if not isinstance(logger, MLFlowLogger):
        logger.log_metrics(dict(figures), step=step)
        return
    named = iter([(re.sub(r"[^a-zA-Z0-9_/. -]", "_", key), value) for key, value in figures.items()])
    while portion := dict(islice(named, _MLFLOW_BATCH)):
        logger.log_metrics(portion, step=step)


def takes_images(logger: Logger) -> bool:
    """Whether `log_image` can send it images."""
    return isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger)


def log_image(logger: Logger, key: str, image: np.ndarray, step: int) -> None:
    """Log an image with the logger's own call. On rank 0.

    Args:
        logger: one that `takes_images`.
        key: its name, the same at every step.
        image: [height, width, 3] uint8.
        step: the Trainer's global step.
    """
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(key, image, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(key, [image], step=step)
    elif isinstance(logger, MLFlowLogger):
        # A file each, which every version of MLflow takes.
        logger.experiment.log_image(logger.run_id, image, f"{key}/{step:08d}.png")
