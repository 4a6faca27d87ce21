"""A GPU stream beside the model's, so that weights and gradients travel while it computes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor


class SideStream:
    """Work on weights and gradients that the model's stream waits for only where it needs the result.

    The CPU waits for neither. On devices without streams, the CPU included, work runs where it is called.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def after_model(self) -> Iterator[None]:
        """Inside, work runs after all that the model's stream has been given so far.

        Tensors of the model's stream that it uses must be alive until `join`.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with self.beside_model():
            yield

    @contextmanager
    def beside_model(self) -> Iterator[None]:
        """Inside, work runs after the work that was given to this stream before, whatever the model's does."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def join(self, results: Collection[Tensor] = ()) -> None:
        """Let the model's stream wait for all work so far.

        Args:
            results: tensors that will be used; for those in the CPU's memory, the CPU waits.
        """
        if self._stream is None:
            return
        model = torch.cuda.current_stream(self._stream.device)
        model.wait_stream(self._stream)
        on_device = [tensor for tensor in results if tensor.is_cuda]
        for tensor in on_device:
            tensor.record_stream(model)
        if len(on_device) < len(results):
            self._stream.synchronize()

    def to(self, value: Tensor, device: torch.device) -> Tensor:
        """`value` on a device; on its way to the CPU's memory until `join`."""
        if value.device == device:
            return value
        with self.beside_model():
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=device.type == "cpu")
            return host.copy_(value, non_blocking=True)


@cache
def side_stream(device: torch.device) -> SideStream:
    """The device's; all layers and engines share it."""
    return SideStream(device)
