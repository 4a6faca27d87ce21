"""Placeholders in `.grad` of sharded parameters while their gradients wait in the slots.

After a backward inside `no_sync()` (accumulation), or one that an exception ended, a layer's gradients are in its slots
until the next collection. User code does not see them there, yet `zero_grad()` and `p.grad = None` must discard them.
So each sharded parameter has a placeholder in `.grad`; if it was zeroed or removed, the gradients in the slots are
discarded.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from swiftmoe_lightning.distributed import local_shard, sharded_like, write_counts

_MARK: Final = "_swiftmoe_placeholder"


class GradientPlaceholder:
    """The value of `.grad` of `sharded` while its gradient waits in the slots.

    It is the gradient from before or, without one, zeros and one tiny number, which scaling keeps and zeroing does not.
    """

    def __init__(self, sharded: nn.Parameter) -> None:
        if sharded.grad is None:
            shard = _zeros_like(local_shard(sharded))
            shard.view(-1)[:1] = max(torch.finfo(shard.dtype).tiny, 2.0**-100)
            sharded.grad = sharded_like(shard, sharded)
            setattr(sharded.grad, _MARK, self)
        self._gradient = sharded.grad
        self._versions = write_counts(self._gradient)

    def hold(self, sharded: nn.Parameter, total: Tensor) -> None:
        """Let the gradient that has come take the place of the zeros, and their memory be free.

        Args:
            sharded: the parameter, of which nobody has replaced `.grad`.
            total: this rank's rows of the gradient. A placeholder that is the gradient from before stays as it is.
        """
        if local_shard(self._gradient).data_ptr() == total.data_ptr():
            # More has been added to it.
            self._versions = write_counts(self._gradient)
            return
        is_ours = sharded.grad is self._gradient and is_placeholder(self._gradient)
        if is_ours and (total.dtype, total.device) == (sharded.dtype, sharded.device):
            self.release()
            self._gradient = sharded_like(total, sharded)
            setattr(self._gradient, _MARK, self)
            sharded.grad = self._gradient
            self._versions = write_counts(self._gradient)

    def was_discarded(self, sharded: nn.Parameter) -> bool:
        """Whether the user has zeroed or removed it."""
        return sharded.grad is None or self.was_zeroed(sharded.grad)

    def release(self) -> None:
        """Turn the placeholder into an ordinary gradient, with whatever values the user has written into it."""
        vars(self._gradient).pop(_MARK, None)

    def was_zeroed(self, gradient: Tensor) -> bool:
        """Whether `gradient` was zeroed: the placeholder itself, or a tensor that replaced it."""
        if gradient is self._gradient and write_counts(gradient) == self._versions:
            return False
        return not local_shard(gradient).any()


def _zeros_like(shard: Tensor) -> Tensor:
    """Zeros that cost no pass over memory on the CPU: pages of zeros, which the system gives out when they are read."""
    if shard.device.type != "cpu" or not shard.numel():
        return torch.zeros_like(shard)
    return torch.from_numpy(np.zeros(shard.nbytes, dtype=np.uint8)).view(shard.dtype).view(shard.shape)


def is_placeholder(gradient: Tensor) -> bool:
    """Whether `gradient` is a placeholder, so that the gradient itself waits in the slots."""
    placeholder = getattr(gradient, _MARK, None)
    return placeholder is not None and not placeholder.was_zeroed(gradient)


def has_gradient(parameter: Tensor) -> bool:
    """Whether `.grad` is a gradient, and not None or a placeholder."""
    return parameter.grad is not None and not is_placeholder(parameter.grad)
