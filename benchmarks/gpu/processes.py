"""Work in processes of its own: one that crashes, hangs or loses its GPU takes nothing else with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Final

LATE: Final = "no time was left"

Say = Callable[[Any], None]


def listen(task: Callable[[Say], object], seconds: float, silence: float, hear: Say) -> str | None:
    """Run `task(say)` in a new process, and `hear` here, in order, whatever it says.

    The process is killed when `seconds` are over, or when it has said nothing for `silence`. Returns None where the
    task came to its end, else why it did not.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(task, sender))
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while True:
            left = max(end - time.monotonic(), 0.0)
            if not receiver.poll(min(left, silence)):
                return LATE if left <= silence else f"nothing was heard of it for {silence:.0f} seconds"
            ended, message = receiver.recv()
            if ended:
                return None if message is None else str(message)
            hear(message)
    except EOFError:
        process.join(10)
        return f"its process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _run(task: Callable[[Say], object], sender: Connection) -> None:
    try:
        task(lambda message: sender.send((False, message)))
    except Exception as error:
        sender.send((True, f"{type(error).__name__}: {str(error)[:500]}"))
    else:
        sender.send((True, None))


def results_of(tasks: Sequence[Callable[[], Any]], workers: int, seconds: float) -> list[tuple[Any, str | None]]:
    """(what it returned, None) or (None, why it did not) for each task, `workers` of them at a time."""
    end = time.monotonic() + seconds
    with ThreadPoolExecutor(workers) as threads:
        return list(threads.map(partial(_result_of, end), tasks))


def _result_of(end: float, task: Callable[[], Any]) -> tuple[Any, str | None]:
    left = end - time.monotonic()
    if left <= 0:
        return None, LATE
    heard: list[Any] = []
    reason = listen(partial(_say_result, task), left, left, heard.append)
    return (None, reason) if reason is not None else (heard[0], None)


def _say_result(task: Callable[[], Any], say: Say) -> None:
    say(task())
