"""What TensorBoard, Weights & Biases and MLflow get of a run, and what both progress bars show of it."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.layout_pb2 import Layout

import swiftmoe_lightning as sml
from swiftmoe_lightning.callbacks.loggers import log_figures
from tests.callbacks.test_popularity_monitor import Memory
from tests.helpers import run_ranks
from tests.strategies.cases import GLOBAL_BATCH, Model, loader, trainer

IMAGES = ["moe/heatmap/popularity", "moe/heatmap/replicas"]


class Wandb(WandbLogger):
    """The run is a double; what Lightning does with it is Lightning's."""

    def __init__(self) -> None:
        self.defined: dict[str, Any] = {}
        self.images: list[Any] = []
        self._double = SimpleNamespace(define_metric=self._define, log=lambda figures: self.logged.update(figures))
        self.logged: dict[str, Any] = {}
        self._prefix, self._wandb_init, self._experiment = "", {}, None
        self._project, self._id = "project", "run"

    @property
    def experiment(self) -> Any:
        return self._double

    def _define(self, name: str, step_metric: str, summary: str) -> None:
        self.defined[name] = (step_metric, summary)

    def log_image(self, key: str, images: list[Any], step: int | None = None, **_: Any) -> None:
        self.images.append((key, images[0].shape, step))

    def finalize(self, status: str) -> None:
        pass


class MLFlow(MLFlowLogger):
    """The client is a double, and figures are kept as they come."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.images: list[Any] = []
        self._run_id = "run"

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(log_image=self._log_image)

    @property
    def name(self) -> str:
        return "experiment"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.batches.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any) -> None:
        pass

    def _log_image(self, run_id: str, image: np.ndarray, artifact_file: str) -> None:
        self.images.append((run_id, image.shape, image.dtype, artifact_file))

    def finalize(self, status: str = "success") -> None:
        pass


def fit(folder: Path) -> dict[str, Any]:
    """What came to the loggers of rank 0 and its progress bars, of two fits: with a capacity, and dropless."""
    wandb, mlflow = Wandb(), MLFlow()
    tensorboard = TensorBoardLogger(folder, name="", version="", prefix="moe_run")
    written = io.StringIO()
    with contextlib.redirect_stdout(written):
        monitor = sml.ExpertPopularityMonitor(heatmap_every_n_steps=3)
        options = {"enable_progress_bar": True, "max_epochs": 1, "log_every_n_steps": 2}
        runner = trainer(2, callbacks=[monitor, TQDMProgressBar()], logger=[tensorboard, wandb, mlflow], **options)
        model = Model(capacity_factor=1.0)
        runner.fit(model, loader(2), loader(2, GLOBAL_BATCH))
    tqdm = written.getvalue()
    shown = dict(runner.progress_bar_metrics)

    console = io.StringIO()
    rich = RichProgressBar(console_kwargs={"file": console, "force_terminal": True, "width": 200})
    dropless = trainer(2, callbacks=[sml.ExpertPopularityMonitor(), rich], **options)
    dropless.fit(Model(), loader(2), loader(2, GLOBAL_BATCH))
    return {
        "defined": wandb.defined,
        "images": [wandb.images, mlflow.images],
        "figures": list(wandb.logged),
        "mlflow": mlflow.batches,
        "bars": (tqdm, console.getvalue()),
        "shown": (shown, dict(dropless.progress_bar_metrics)),
    }


def events(folder: Path) -> Iterator[Any]:
    """TensorBoard's events: each is framed by its length and two checksums."""
    (path,) = folder.glob("events.*")
    content, at = path.read_bytes(), 0
    while at < len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + size])
        at += 16 + size


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("logs")
    return folder, run_ranks(fit, 2, folder, init=False)


def test_tensorboard_gets_charts_that_find_their_figures_and_images(came: Any) -> None:
    folder, _ = came
    layout, figures, images = Layout(), defaultdict(list), defaultdict(list)
    for event in events(folder):
        for value in event.summary.value:
            if value.metadata.plugin_data.plugin_name == "custom_scalars":
                layout = Layout.FromString(value.tensor.string_val[0])
            elif value.HasField("image"):
                images[value.tag].append((event.step, value.image.height, value.image.width))
            elif value.tag:
                figures[value.tag].append(event.step)
    (category,) = layout.category
    assert category.title == "MoE"
    # TensorBoard looks for a chart's figures with `re.match`.
    found = {
        chart.title: {tag for pattern in chart.multiline.tag for tag in figures if re.match(pattern, tag)}
        for chart in category.chart
    }
    lost = {f"moe_run-moe/lost/{cause}" for cause in ("split", "placement", "prediction", "floor", "rounding")}
    assert found == {
        "survival": {"moe_run-moe/token_survival_rate"},
        "imbalance": {"moe_run-moe/imbalance", "moe_run-moe/imbalance_max"},
        "lost to": lost,
        "survival of each layer": {"moe_run-moe/moe.experts/token_survival_rate"},
        "imbalance of each layer": {"moe_run-moe/moe.experts/imbalance"},
        "replicas moved": {"moe_run-moe/num_replicas_moved"},
        "bytes of tokens": {f"moe_run-moe/token_bytes_{where}_nodes" for where in ("inside", "between")},
    }
    assert figures["moe_run-moe/imbalance"] == [2, 4]
    assert images == {key: [(3, 170, 800), (4, 170, 800)] for key in IMAGES}


def test_weights_and_biases_gets_an_axis_summaries_and_images(came: Any) -> None:
    rank_0, rank_1 = came[1]
    assert rank_0["defined"] == {
        "moe/token_survival_rate": ("trainer/global_step", "min,mean,last"),
        "moe/imbalance": ("trainer/global_step", "mean,last"),
        "moe/imbalance_max": ("trainer/global_step", "max,last"),
    }
    assert {*rank_0["defined"], "trainer/global_step"} <= {*rank_0["figures"]}
    assert rank_0["images"][0] == [(key, (170, 800, 3), step) for step in (3, 4) for key in IMAGES]
    assert rank_1["defined"] == {}
    assert rank_1["images"] == [[], []]


def test_mlflow_gets_images_as_files_and_names_that_it_accepts(came: Any) -> None:
    rank_0 = came[1][0]
    assert rank_0["images"][1] == [
        ("run", (170, 800, 3), np.dtype("uint8"), f"{key}/0000000{step}.png") for step in (3, 4) for key in IMAGES
    ]
    assert [step for step, figures in rank_0["mlflow"] if "moe/imbalance" in figures] == [2, 4]
    logger = MLFlow()
    log_figures(logger, {"moe/layer@1/imbalance": 1.0, **{f"moe/{i}": 0.0 for i in range(1000)}}, 7)
    (step, first), (_, rest) = logger.batches
    assert (step, len(first), len(rest)) == (7, 1000, 1)
    assert first["moe/layer_1/imbalance"] == 1.0


def test_both_progress_bars_show_imbalance_and_survival_where_tokens_can_be_dropped(came: Any) -> None:
    rank_0, rank_1 = came[1]
    tqdm, rich = rank_0["bars"]
    capped, dropless = rank_0["shown"]
    assert re.search(r"imbalance=\d\.\d+, survival=0\.\d+", tqdm)
    assert re.search(r"imbalance: \d\.\d+", rich)
    assert "survival" not in rich
    # Numbers of the host, which no progress bar has to wait for; the same ones on all ranks.
    assert [type(value) for value in capped.values()] == [float, float]
    assert capped.keys() == {"imbalance", "survival"}
    assert dropless.keys() == {"imbalance"}
    assert rank_1["shown"] == rank_0["shown"]


def no_images() -> None:
    monitor = sml.ExpertPopularityMonitor(heatmap_every_n_steps=1)
    runner = trainer(1, "auto", logger=Memory(), callbacks=[monitor], log_every_n_steps=1)
    runner.fit(Model(), loader(1), loader(1))


def test_heat_maps_that_no_logger_takes_are_warned_of() -> None:
    with pytest.raises(AssertionError, match=r"draws no heat maps, as no logger.*Add a TensorBoardLogger"):
        run_ranks(no_images, 1, init=False)
