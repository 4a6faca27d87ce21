"""Ranks with different numbers of batches: evaluation runs to its end, training is refused."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class JoinCallback(Callback):
    """Lets a rank without more evaluation batches serve the other ranks' expert layers until all are done.

    A training epoch in which ranks have different numbers of batches is an error on every rank, before it begins.
    Where the numbers are not known, it is an error at the end of the shortest rank's epoch, or, if Lightning's own
    broadcast before a batch comes first, when the process group times out.

    Ranks join once a loop: after the last batch, before metrics are reduced; at the end of the epoch if the last
    batch was not known to be it; and after the run if this rank had no batch at all.
    """

    def __init__(self) -> None:
        self._joined = False

    @classmethod
    def add_to(cls, trainer: Trainer) -> None:
        """Add it as the first callback, before any that communicates."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.insert(0, cls())

    def _join(self, trainer: Trainer) -> None:
        if not self._joined:
            self._joined = True
            trainer.strategy.engine.join()  # type: ignore[attr-defined]

    def _join_after_last(self, trainer: Trainer, progress: Any) -> None:
        if progress.is_last_batch:
            self._join(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        engine = trainer.strategy.engine  # type: ignore[attr-defined]
        if engine.layers:
            num_batches = -1 if math.isinf(trainer.num_training_batches) else int(trainer.num_training_batches)
            refuse_uneven_training(engine.layers[0].handshake.begin_epoch(num_batches))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._joined = False
        self._join(trainer)

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._joined = False

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        fitting = trainer.state.fn == "fit"
        loop = trainer.fit_loop.epoch_loop.val_loop if fitting else trainer.validate_loop
        self._join_after_last(trainer, loop.batch_progress)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._join(trainer)

    @override
    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._join_after_last(trainer, trainer.test_loop.batch_progress)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._join(trainer)

    @override
    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._join_after_last(trainer, trainer.predict_loop.batch_progress)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._join(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            self._join(trainer)
        self._joined = False


def refuse_uneven_training(num_batches_W: list[int]) -> None:
    """Refuse to train where ranks have differently many batches.

    Args:
        num_batches_W: each rank's training batches, -1 where they are not known.

    Raises:
        ValueError: when they differ.
    """
    if len(set(num_batches_W)) > 1:
        numbers = ("unknown" if n < 0 else str(n) for n in num_batches_W)
        raise ValueError(
            f"ranks have different numbers of training batches ({', '.join(numbers)}, by rank), and would wait for "
            "each other: give all ranks equally many training batches (drop_last=True, or limit_train_batches). "
            "(FAQ: uneven-batches)"
        )
