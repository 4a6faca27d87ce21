"""All ranks on the CPU, for a thread of its own: they agree on errors, and send each other values and files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from swiftmoe_lightning.distributed.group import timeout_of

_Value = TypeVar("_Value")


class FileMessage(NamedTuple):
    """A file of `size` bytes that goes from `path` on the rank `source` to the path `there` on the rank `to`."""

    path: Path
    source: int
    there: Path
    to: int
    size: int


class HostGroup:
    """A gloo group of all ranks. Construction is a collective, and so are all methods.

    Args:
        device_type: it waits as long as the default group does on this one.

    Raises:
        ValueError: without a process group.
    """

    def __init__(self, device_type: str) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "no process group, by which ranks agree on what each has. Call torch.distributed.init_process_group "
                "first, on one rank as well. (FAQ: memory-checkpoint)"
            )
        assert dist.group.WORLD is not None
        timeout = timeout_of(dist.group.WORLD, device_type)
        self.process_group = dist.new_group(backend="gloo", timeout=timeout)
        self.rank: int = dist.get_rank()

    def together(self, action: Callable[[], _Value]) -> _Value:
        """`action()` on every rank; this rank's value, when all are done.

        Raises:
            OSError: on all ranks, if it raised on one.
        """
        cause: Exception | None = None
        try:
            value = action()
        except Exception as error:
            cause = error
        failures = self.gather(None if cause is None else f"rank {self.rank}: {type(cause).__name__}: {cause}")
        if any(failures):
            raise OSError("; ".join(filter(None, failures))) from cause
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank."""
        values: list[Any] = [None] * self.process_group.size()
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def broadcast(self, values: list[Any]) -> list[Any]:
        """Rank 0's values. Other ranks give as many."""
        received = list(values)
        dist.broadcast_object_list(received, src=0, group=self.process_group)
        return received

    def send_files(self, messages: Iterable[FileMessage]) -> None:
        """Send files of at least one byte. All ranks give the same messages, in the same order.

        Raises:
            OSError: on all ranks, if one has no room.
        """
        messages = list(messages)
        # Room is made first, so that a rank without it is an error on all, and none waits for it.
        buffers = self.together(lambda: [_make_room(m.there, m.size) for m in messages if m.to == self.rank])
        pending, received = [], iter(buffers)
        for message in messages:
            if message.source == self.rank:
                content = torch.from_file(str(message.path), size=message.size, dtype=torch.uint8)
                pending.append(dist.isend(content, message.to, group=self.process_group))
            if message.to == self.rank:
                pending.append(dist.irecv(next(received), message.source, group=self.process_group))
        for work in pending:
            assert work is not None
            work.wait()
        self.together(lambda: None)


def _make_room(path: Path, size: int) -> Tensor:
    """A file of `size` bytes, as a tensor that writes to it. A full tmpfs is an error here, not a SIGBUS later."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
