"""Ctrl-C in the demo: a short message, exit status 130, and no rank left behind."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

import lightning as L
from rich.console import Console

# How long rank 0 may wait for others, after Ctrl-C.
_PATIENCE_S: Final = 5.0


@contextmanager
def ctrl_c_ends(trainer: L.Trainer, message: Callable[[int], str]) -> Iterator[None]:
    """Inside the block, SIGINT ends the run: Lightning stops it, callbacks write, and the other ranks are killed.

    Rank 0 alone hears it. It blocks the signal for its main thread, which the processes that Lightning starts inherit:
    so they print nothing and break no exchange. A thread waits for it, since rank 0 may be waiting for others in torch,
    where Python handles no signals.

    Args:
        trainer: it trains in the block.
        message: optimizer steps done -> what rank 0 prints.
    """
    if not trainer.is_global_zero:
        yield
        return
    came, is_over = threading.Event(), threading.Event()

    def hear(signum: int, frame: FrameType | None) -> None:
        came.set()
        signal.default_int_handler(signum, frame)

    def wait() -> None:
        signal.sigwait({signal.SIGINT})
        if is_over.is_set():
            return
        _thread.interrupt_main()
        time.sleep(_PATIENCE_S)
        _end(trainer, message)

    before = signal.signal(signal.SIGINT, hear)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    assert thread.ident is not None
    try:
        yield
    # Lightning turns the KeyboardInterrupt into SystemExit.
    except BaseException:
        if came.is_set():
            _end(trainer, message)
        raise
    finally:
        is_over.set()
        signal.pthread_kill(thread.ident, signal.SIGINT)
        thread.join()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, before)


def _end(trainer: L.Trainer, message: Callable[[int], str]) -> NoReturn:
    if trainer.strategy.launcher is not None:
        trainer.strategy.launcher.kill(signal.SIGKILL)
    # The progress bar's line has no end.
    Console().print(f"\n{message(trainer.global_step)}", soft_wrap=True, markup=False)
    sys.stdout.flush()
    # At once: Lightning's watcher kills rank 0 when it finds that another rank was killed.
    os._exit(128 + signal.SIGINT)
