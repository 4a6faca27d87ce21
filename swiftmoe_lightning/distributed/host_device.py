"""Every copy between the host and the device that a training step makes.

On a GPU the host's side is pinned memory: the host does not wait for a copy up, and waits for one down only when it
needs the numbers. Elsewhere the same functions copy plainly, or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor

# Bytes at whose multiples arrays begin in the buffer, so that any dtype and any load fits.
_ALIGNMENT: Final = 16


def to_device(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Copy arrays to `device`, all in one transfer, for which the host does not wait.

    Args:
        device: where they go.
        *arrays: of any shapes and dtypes.

    Returns:
        A tensor for each array, of its shape and dtype.
    """
    values = [torch.from_numpy(array) for array in arrays]
    num_bytes = sum(map(_padded, values))
    # The allocator of pinned memory gives the buffer to nobody else before the copy is done.
    buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    for part, value in zip(_parts(buffer, values), values, strict=True):
        part.copy_(value)
    return tuple(_parts(buffer.to(device, non_blocking=True), values))


def _padded(value: Tensor) -> int:
    return -(-value.nbytes // _ALIGNMENT) * _ALIGNMENT


def _parts(buffer: Tensor, like: Sequence[Tensor]) -> Iterator[Tensor]:
    """Views of `buffer`, one after the other, each of the shape and dtype of a tensor."""
    start = 0
    for value in like:
        yield buffer[start : start + value.nbytes].view(value.dtype).view(value.shape)
        start += _padded(value)


def to_host(value: Tensor) -> np.ndarray:
    """`value` on the host, which waits for it."""
    return HostCopy(value.device, lambda: value).wait()


class HostCopy:
    """A copy to the host under way, behind which the device goes on.

    Args:
        device: from where.
        arrive: gives the tensor, ready for use on the current stream; an exchange's `wait`, for one.
    """

    def __init__(self, device: torch.device, arrive: Callable[[], Tensor]) -> None:
        self._arrive = arrive
        self._copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            # On a stream of its own: what is launched next does not queue behind the exchange that the copy waits for.
            stream = _copy_stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                # Kept until the copy is done, since its memory belongs to another stream.
                self._value = arrive()
                self._host = torch.empty(self._value.shape, dtype=self._value.dtype, device="cpu", pin_memory=True)
                self._host.copy_(self._value, non_blocking=True)
                self._copied = stream.record_event()

    def wait(self) -> np.ndarray:
        """The numbers. The one place where the host waits for a device."""
        if self._copied is None:
            return self._arrive().cpu().numpy()
        self._copied.synchronize()
        return self._host.numpy()


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
