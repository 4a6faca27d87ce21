"""One demo run, from options to a table and a picture."""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import lightning as L
import numpy as np
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from torch.utils.data import DataLoader
from typing_extensions import override

from swiftmoe_lightning.analysis.report.page_text import path_text
from swiftmoe_lightning.analysis.report.picture import draw_picture
from swiftmoe_lightning.analysis.time_to_loss import Curve
from swiftmoe_lightning.callbacks import ExpertPopularityMonitor, PlacementRecorder
from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.demo.gpt import GPT, LanguageModel
from swiftmoe_lightning.demo.interrupt import ctrl_c_ends
from swiftmoe_lightning.demo.options import DemoOptions
from swiftmoe_lightning.demo.printing import (
    draw_if_possible,
    print_next,
    print_outcome,
    tell_if_nothing_is_drawn,
)
from swiftmoe_lightning.demo.summary import dropped_share, summary_rows
from swiftmoe_lightning.demo.text import Sequences, read_texts, split_texts
from swiftmoe_lightning.strategies import SwiftMoEStrategy

_CPU_RANKS: Final = 4
_VALIDATIONS: Final = 20
_RECORDING: Final = "placements.npz"
# All that a run may write.
_FILES: Final = (_RECORDING, "picture.png", "metrics.csv", "hparams.yaml")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Attributes:
        accelerator: "cuda" or "cpu".
        per_node: processes on each machine.
        num_nodes: machines.
    """

    accelerator: str
    per_node: int
    num_nodes: int = 1

    @property
    def total(self) -> int:
        """Processes on all machines together."""
        return self.per_node * self.num_nodes

    @classmethod
    def find(cls, requested: int | None) -> Ranks:
        """The ranks to run on.

        Args:
            requested: how many; None takes torchrun's, or one a GPU, or 4 on the CPU.

        Raises:
            ValueError: for another number than torchrun started, or more than there are GPUs.
        """
        num_gpus = torch.cuda.device_count()
        accelerator = "cuda" if num_gpus else "cpu"
        if TorchElasticEnvironment.detect():
            total, per_node = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
            if requested not in (None, total):
                raise ValueError(f"--ranks is {requested}, but torchrun started {total}. Leave --ranks out.")
            return cls(accelerator, per_node, total // per_node)
        if num_gpus and (requested or 0) > num_gpus:
            raise ValueError(f"--ranks is {requested}, but there are {num_gpus} GPUs. Use --ranks {num_gpus} or fewer.")
        return cls(accelerator, requested or num_gpus or _CPU_RANKS)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of a run.

    Attributes:
        rows: its numbers, by name.
        curve: its losses over steps and seconds.
        files: what was written to its folder.
    """

    rows: dict[str, str]
    curve: Curve
    files: list[str]


class StepTimer(Callback):
    """Measures the seconds of every training step, without loading its batch.

    Attributes:
        seconds: one entry a batch.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)


class Demo:
    """One run. Wrong options are errors here, before a process is started.

    Args:
        options: of the run.

    Raises:
        ValueError: for options that the text or the ranks do not allow, with what to do in the message.
        OSError: for a missing text, or a folder that cannot be made, with what to do in the message.
    """

    def __init__(self, options: DemoOptions) -> None:
        self.options, self.ranks = options, Ranks.find(options.ranks)
        if options.batch_size % self.ranks.total:
            raise ValueError(
                f"--batch-size must be a multiple of the {self.ranks.total} ranks, got {options.batch_size}."
            )
        self._slots_per_rank = options.slots_on(self.ranks.total)
        SwiftMoEConfig(slots_per_rank=self._slots_per_rank).resolve_slots_per_rank(options.experts, self.ranks.total)
        self._train_text, self._val_text = split_texts(read_texts(options.data), options.seq_len)
        options.folder.mkdir(parents=True, exist_ok=True)
        L.seed_everything(options.seed, verbose=False)
        self._model = self._make_model()

    def run(self) -> None:
        """Train, and on rank 0 print the numbers. Files of an earlier run in the folder are removed first."""
        tell_if_nothing_is_drawn()
        self.clear_folder()
        if (outcome := self.train()) is not None:
            print_outcome(self._title, {self.options.strategy: outcome.rows}, self.options.folder, outcome.files)
            print_next(self.options.folder)

    def train(self) -> Outcome | None:
        """Train, and write metrics.csv, placements.npz and picture.png to the folder.

        Returns:
            On rank 0, what came of it.
        """
        self._announce()
        timer, recorder = StepTimer(), PlacementRecorder(self.options.folder / _RECORDING)
        trainer = self._make_trainer([timer, ExpertPopularityMonitor(), recorder])
        with ctrl_c_ends(trainer, self._stopped):
            trainer.fit(self._model, self._loader(train=True), self._loader(train=False))
        return self._outcome(recorder, timer) if trainer.is_global_zero else None

    @rank_zero_only
    def clear_folder(self) -> None:
        """Remove what an earlier run wrote, so that a run that is stopped leaves no mixture of both."""
        for name in _FILES:
            (self.options.folder / name).unlink(missing_ok=True)

    def _stopped(self, num_steps: int) -> str:
        return (
            f"Stopped after {num_steps} of {self.options.steps} steps. What was recorded is in "
            f"{path_text(self.options.folder)}/."
        )

    @property
    def _title(self) -> str:
        return f"{self.options.strategy}: {self.options.steps} steps on {self.ranks.total} ranks"

    @rank_zero_only
    def _announce(self) -> None:
        options, ranks = self.options, self.ranks
        size = sum(p.numel() for p in self._model.parameters()) / 1e6
        text = (len(self._train_text) + len(self._val_text)) / 1e6
        Console().print(
            f"{options.strategy}: {size:.1f} M parameters, {options.layers} layers of {options.experts} experts, "
            f"{text:.1f} MB text, {ranks.total} ranks ({ranks.accelerator}).",
            soft_wrap=True,
        )

    def _make_model(self) -> LanguageModel:
        options = self.options
        gpt = GPT(
            options.layers,
            options.dim,
            hidden_dim=options.hidden_dim,
            num_experts=options.experts,
            top_k=options.top_k,
            capacity_factor=options.capacity_factor or None,
            capacity_per="slot" if options.strategy == "static" else "rank",
            aux_loss_coef=options.aux_loss_coef,
        )
        return LanguageModel(gpt, options.lr, options.steps)

    def _loader(self, train: bool) -> DataLoader[torch.Tensor]:
        """Batches of this rank: Lightning deals the sequences of each global batch to the ranks in turn."""
        options = self.options
        if train:
            num = options.steps * options.batch_size
            sequences = Sequences.at_random(self._train_text, options.seq_len, num, options.seed)
        else:
            sequences = Sequences.evenly(self._val_text, options.seq_len, 2 * options.batch_size)
        return DataLoader(sequences, batch_size=options.batch_size // self.ranks.total)

    def _make_trainer(self, callbacks: list[Callback]) -> L.Trainer:
        options, ranks = self.options, self.ranks
        _silence_lightning()
        logger = CSVLogger(options.folder, name="", version="")
        logger.log_hyperparams({k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()})
        return L.Trainer(
            accelerator=ranks.accelerator,
            devices=ranks.per_node,
            num_nodes=ranks.num_nodes,
            strategy=SwiftMoEStrategy(
                slots_per_rank=self._slots_per_rank,
                placement="static" if options.strategy == "static" else SwiftMoEConfig.placement,
            ),
            precision="bf16-mixed" if ranks.accelerator == "cuda" else "32-true",
            max_epochs=1,
            # The interval divides the steps, so that the last validation follows the last step.
            val_check_interval=options.steps // math.gcd(options.steps, _VALIDATIONS),
            # A whole validation before the first step.
            num_sanity_val_steps=-1,
            gradient_clip_val=1.0,
            log_every_n_steps=min(10, options.steps),
            logger=logger,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_model_summary=False,
        )

    def _outcome(self, recorder: PlacementRecorder, timer: StepTimer) -> Outcome:
        options, model = self.options, self._model
        with np.load(recorder.path) as recording:
            rows = summary_rows(recording, model.val_losses, timer.seconds)
            dropped = dropped_share(recording)
            pictures = draw_if_possible(
                options.folder / "picture.png", lambda path: draw_picture(recording, path, self._title)
            )
        files = [*pictures, "metrics.csv", recorder.path.name]
        clock = np.append(0.0, np.cumsum(timer.seconds))
        seconds = [float(clock[step]) for step in model.val_steps]
        return Outcome(rows, Curve(options.strategy, model.val_steps, seconds, model.val_losses, dropped), files)


def _silence_lightning() -> None:
    """Silence Lightning's advice on hardware, workers and folders, which the demo has chosen."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*directory .* exists and is not empty.*",
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=message)
