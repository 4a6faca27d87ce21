"""Ctrl-C in the demo: a short message, exit status 130, and no rank left behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import lightning as L
from rich.console import Console

_STATUS = 128 + signal.SIGINT


@contextmanager
def ctrl_c_ends(trainer: L.Trainer, message: Callable[[int], str]) -> Iterator[None]:
    """Inside the block, SIGINT ends the process: after Lightning has stopped the ranks, and callbacks have written.

    Args:
        trainer: it trains in the block.
        message: optimizer steps done -> what rank 0 prints.
    """
    came = False

    def remember(signum: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        signal.default_int_handler(signum, frame)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    # Lightning raises SystemExit; a collective that a rank has left already, an error of its own.
    except BaseException:
        if not came:
            raise
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if trainer.is_global_zero:
            # The progress bar's line has no end.
            Console().print(f"\n{message(trainer.global_step)}", soft_wrap=True, markup=False)
        sys.stdout.flush()
        sys.stderr.flush()
        # At once: Lightning's watcher kills rank 0 when it finds another one that ended with an error, and gloo's
        # threads must not outlive the interpreter.
        os._exit(_STATUS if trainer.is_global_zero else 0)
    finally:
        signal.signal(signal.SIGINT, before)
