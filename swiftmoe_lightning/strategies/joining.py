"""The end of every epoch, where ranks may arrive with different numbers of batches."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class JoinRanks(Callback):
    """A rank that is out of evaluation batches serves the others' expert layers until all are.

    At the end of a training epoch there is nothing to serve: a rank that trains on gets an error that says so, on
    every rank, where it would otherwise wait for the others for ever.
    """

    @classmethod
    def add_to(cls, trainer: Trainer) -> None:
        """Make it the first callback, so that it comes before any that talks to the other ranks."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, cls) for callback in callbacks):
            callbacks.insert(0, cls())

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._join(trainer)

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._join(trainer)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._join(trainer)

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._join(trainer)

    @staticmethod
    def _join(trainer: Trainer) -> None:
        trainer.strategy.engine.join()  # type: ignore[attr-defined]
