"""Every copy between the host and the device that a training step makes.

On a GPU the host's side is pinned memory: the host does not wait for a copy up, and waits for one down only when it
needs the numbers. Elsewhere the same functions copy plainly, or not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

# Bytes at whose multiples arrays begin: kernels are compiled anew for a pointer that is aligned otherwise.
_ALIGNMENT: Final = 16


def to_device(device: torch.device, *arrays: np.ndarray) -> tuple[Tensor, ...]:
    """Copy arrays to `device`, all in one transfer, for which the host does not wait.

    Args:
        device: where they go.
        *arrays: of one dtype.

    Returns:
        A tensor for each array, of its shape and dtype.
    """
    dtype = arrays[0].dtype
    assert all(array.dtype == dtype for array in arrays), [array.dtype for array in arrays]
    # Each array's elements, and how many behind them are padding.
    sizes = [size for array in arrays for size in (array.size, -array.size % (_ALIGNMENT // dtype.itemsize))]
    flat = np.zeros(sum(sizes), dtype)
    start = 0
    for array, size, padding in zip(arrays, sizes[::2], sizes[1::2], strict=True):
        flat[start : start + size] = array.ravel()
        start += size + padding
    host = torch.from_numpy(flat)
    if device.type == "cuda":
        # The allocator of pinned memory gives it to nobody else before the copy is done.
        host = host.pin_memory()
    parts = host.to(device, non_blocking=True).split(sizes)[::2]
    return tuple(part.view(array.shape) for part, array in zip(parts, arrays, strict=True))


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
