"""Memory of large CPU tensors that every training step needs again.

For a large tensor the CPU's allocator asks the system for fresh pages, and returns them with the tensor: to fill them
takes longer than to copy into pages that are there. A GPU's allocator keeps what it once has.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

# Whether a storage is free; a torch without it allocates as ever.
_use_count: Final = getattr(torch._C, "_storage_Use_Count", None)
# Below, allocators keep blocks themselves.
_SMALLEST: Final = 1 << 20
# A free block is given back to the system when as many others have been taken since it was last used.
_MOST_IDLE: Final = 256


def reused_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, contiguous, in memory of earlier such tensors that nothing refers to any more.

    Args:
        shape: of the tensor.
        dtype: of the tensor.
        device: only on the CPU memory is reused here.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < _SMALLEST or _use_count is None:
        return torch.empty(shape, dtype=dtype, device=device)
    # Not an inference tensor, whatever the mode: the block outlives it.
    with torch.inference_mode(False), torch.no_grad():
        block = _pool.take(num_bytes)
        # Not a view: the tensor is to be like any other.
        strides = torch.empty(shape, device="meta").stride()
        return torch.empty(0, dtype=dtype).set_(block.untyped_storage(), 0, tuple(shape), strides)


def count_uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and other objects have the storage."""
    assert _use_count is not None
    uses: int = _use_count(storage._cdata)
    return uses


@dataclass(eq=False)
class _Block:
    """A storage, and when it was last taken."""

    storage: torch.UntypedStorage
    own_count: int
    last_taken: int

    @property
    def is_free(self) -> bool:
        return count_uses(self.storage) == self.own_count


class BlockPool:
    """Storages that are given out again once no tensor has them."""

    def __init__(self) -> None:
        self.blocks: list[_Block] = []
        self._num_taken = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> Tensor:
        """[num_bytes] uint8, in a storage that no other tensor has, at most a quarter larger."""
        with self._lock:
            self._num_taken += 1
            fitting = [b for b in self.blocks if num_bytes <= b.storage.nbytes() <= 1.25 * num_bytes and b.is_free]
            block = min(fitting, key=lambda b: b.storage.nbytes(), default=None)
            if block is None:
                self._give_back_idle()
                block = self._allocate(num_bytes)
            block.last_taken = self._num_taken
            return torch.empty(0, dtype=torch.uint8).set_(block.storage, 0, (num_bytes,), (1,))

    def _allocate(self, num_bytes: int) -> _Block:
        # Sizes change a little with every placement: in steps of an eighth, most fit into what was there before.
        step = 1 << max(num_bytes.bit_length() - 4, 0)
        storage = torch.UntypedStorage(-(-num_bytes // step) * step)
        block = _Block(storage, count_uses(storage), 0)
        self.blocks.append(block)
        return block

    def _give_back_idle(self) -> None:
        is_kept = [self._num_taken - b.last_taken <= _MOST_IDLE or not b.is_free for b in self.blocks]
        self.blocks = [b for b, kept in zip(self.blocks, is_kept, strict=True) if kept]


_pool: Final = BlockPool()
