"""What a SIGTERM (preemption, `docker stop`, `kill`) does to a run."""

from __future__ import annotations

import functools
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from swiftmoe_lightning.engine import SwiftMoEEngine


def stop_together(trainer: Trainer, engine: SwiftMoEEngine) -> None:
    """Let a SIGTERM stop all ranks after the same training batch; in evaluation, at once.

    Lightning (2.6) broadcasts from inside its handler, wherever the signal finds each rank; between the exchanges of
    expert layers that is a collective which the other ranks do not expect. Here the signal is only noted, and the
    engine's next exchange of counts tells all ranks.
    """
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = functools.partial(_on_sigterm, trainer, engine)


def note_agreed_stop(trainer: Trainer, engine: SwiftMoEEngine) -> None:
    """After a training batch's forward: tell Lightning's loop, which stops at the end of the batch."""
    if engine.stops:
        trainer._signal_connector.received_sigterm = True


def _on_sigterm(trainer: Trainer, engine: SwiftMoEEngine, signum: int, _: FrameType | None) -> None:
    if trainer.strategy.launcher is not None:
        # To the processes that rank 0 started.
        trainer.strategy.launcher.kill(signum)
    if not trainer.state.fn == "fit":
        raise SIGTERMException
    engine.request_stop()
