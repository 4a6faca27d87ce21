"""Tasks in processes of their own, so that one that crashes, hangs or loses its GPU does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, Final

LATE: Final = "no time was left"

Send = Callable[[Any], None]


def listen(task: Callable[[Send], object], seconds: float, silence: float, receive: Send) -> str | None:
    """Run `task(send)` in a new process, and call `receive` here with each message that it sends, in order.

    Args:
        seconds: after which the process is killed.
        silence: seconds without a message after which it is killed, too.

    Returns:
        None where the task came to its end, else why it did not.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(task, sender))
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while True:
            remaining = max(end - time.monotonic(), 0.0)
            if not receiver.poll(min(remaining, silence)):
                return LATE if remaining <= silence else f"it sent nothing for {silence:.0f} seconds"
            ended, message = receiver.recv()
            if ended:
                return None if message is None else str(message)
            receive(message)
    except EOFError:
        process.join(10)
        return f"its process died with exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
        receiver.close()


def _run(task: Callable[[Send], object], sender: Connection) -> None:
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
    remaining = end - time.monotonic()
    if remaining <= 0:
        return None, LATE
    results: list[Any] = []
    reason = listen(partial(_send_result, task), remaining, remaining, results.append)
    return (None, reason) if reason is not None else (results[0], None)


def _send_result(task: Callable[[], Any], send: Send) -> None:
    send(task())
