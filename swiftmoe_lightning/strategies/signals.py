"""Stops a run at SIGTERM (preemption, `docker stop`, `kill`), or at the signal by which SLURM asks to requeue."""

from __future__ import annotations

import functools
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from swiftmoe_lightning.engine import SwiftMoEEngine


def stop_together(trainer: Trainer, engine: SwiftMoEEngine) -> None:
    """Let a signal stop all ranks after the same training batch. In evaluation SIGTERM stops a rank at once.

    Lightning (2.6) broadcasts from inside its SIGTERM handler, and saves from inside SLURM's, wherever the signal finds
    each rank; between the exchanges of expert layers those are collectives which the other ranks do not expect. Here
    the signal is only noted, and the engine's next exchange of counts tells all ranks.
    """
    # A stop that was asked for in an earlier run of this module does not stop this run.
    for layer in engine.layers:
        layer.handshake.reset_stop()
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [callback for callback in callbacks if not isinstance(callback, _StopTogether)]
    callbacks.append(stopper := _StopTogether(engine))
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = functools.partial(stopper.on_sigterm, trainer)
    connector._slurm_sigusr_handler_fn = functools.partial(stopper.on_requeue, trainer)


def note_agreed_stop(trainer: Trainer, engine: SwiftMoEEngine) -> None:
    """After a training batch's forward: tell Lightning's loop, which stops at the end of the batch.

    If validation follows the batch, it runs first. A stop inside it would find ranks at different batches.
    """
    loop = trainer.fit_loop
    if engine.stops and _may_stop(trainer) and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
        trainer._signal_connector.received_sigterm = True


def _may_stop(trainer: Trainer) -> bool:
    """Whether a training batch may be the last.

    Not while gradients accumulate, which would be lost without their optimizer step; and not after the last batch of
    an epoch, since Lightning (2.6) resumes from there with one batch too many.
    """
    loop = trainer.fit_loop.epoch_loop
    return not loop._should_accumulate() and not loop._num_ready_batches_reached()


class _StopTogether(Callback):
    def __init__(self, engine: SwiftMoEEngine) -> None:
        self._engine = engine
        self._requeue_signum: int | None = None

    def on_sigterm(self, trainer: Trainer, signum: int, _: FrameType | None) -> None:
        if trainer.strategy.launcher is not None:
            # Rank 0 passes the signal on to the processes that it started.
            trainer.strategy.launcher.kill(signum)
        if not trainer.state.fn == "fit":
            raise SIGTERMException
        self._engine.request_stop()

    def on_requeue(self, trainer: Trainer, signum: int, _: FrameType | None) -> None:
        if trainer.state.fn == "fit":
            self._requeue_signum = signum
            self._engine.request_stop()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self._engine.stops and _may_stop(trainer):
            trainer._signal_connector.received_sigterm = True

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._engine.stops and trainer.num_training_batches == 1:
            trainer._signal_connector.received_sigterm = True

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._engine.stops:
            trainer._signal_connector.received_sigterm = True
            raise SIGTERMException

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save and requeue as Lightning does for SLURM, if any rank was asked to."""
        if not (trainer.received_sigterm and isinstance(exception, SIGTERMException)):
            return
        if trainer.strategy.reduce_boolean_decision(self._requeue_signum is not None, all=False):
            connector: Any = trainer._signal_connector
            type(connector)._slurm_sigusr_handler_fn(connector, self._requeue_signum, None)
