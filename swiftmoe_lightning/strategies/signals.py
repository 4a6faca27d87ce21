"""What a SIGTERM (preemption, `docker stop`, `kill`) does to a run."""

from __future__ import annotations

import functools
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer


def stop_between_batches(trainer: Trainer) -> None:
    """Let a SIGTERM only be noted, and passed on to the processes that rank 0 started.

    Lightning (2.6) broadcasts from inside its handler, wherever the signal finds each rank; between the exchanges of
    expert layers that is a collective which the other ranks do not expect. Its training loop asks rank 0 before
    every batch anyway, and stops all ranks together.
    """
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = functools.partial(_note, trainer)


def _note(trainer: Trainer, signum: int, _: FrameType | None) -> None:
    connector: Any = trainer._signal_connector
    launcher = trainer.strategy.launcher
    if not connector.received_sigterm and launcher is not None:
        launcher.kill(signum)
    connector.received_sigterm = True
