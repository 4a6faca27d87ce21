"""Gradients that wait in the slots, as the user's API sees them: through `.grad` of the sharded parameters.

Between a backward without synchronisation (accumulation), or one that an exception ended, and the collection, a
layer's gradients are in its slots, which nobody outside sees. `zero_grad()` and `p.grad = None` must discard them all
the same. So a placeholder stands in `.grad` of each sharded parameter, and what became of it says what to do.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from swiftmoe_lightning.distributed import local_shard, sharded_like

_MARK: Final = "_swiftmoe_placeholder"


class GradientPlaceholder:
    """What stands in `.grad` of `sharded` while its gradient waits in the slots.

    The gradient that was there before, or zeros with one tiny number among them: scaling keeps it, zeroing does not.
    """

    def __init__(self, sharded: nn.Parameter) -> None:
        if sharded.grad is None:
            shard = torch.zeros_like(local_shard(sharded))
            shard.view(-1)[:1] = max(torch.finfo(shard.dtype).tiny, 2.0**-100)
            sharded.grad = sharded_like(shard, sharded)
            setattr(sharded.grad, _MARK, self)
        self._gradient = sharded.grad
        self._versions = _versions(self._gradient)

    def was_discarded(self, sharded: nn.Parameter) -> bool:
        """Whether the user has zeroed it or taken it away."""
        return sharded.grad is None or self.was_zeroed(sharded.grad)

    def release(self) -> None:
        """Let the placeholder be a gradient like any other from now on, with what its owner has written into it."""
        vars(self._gradient).pop(_MARK, None)

    def was_zeroed(self, gradient: Tensor) -> bool:
        """Whether `gradient` is the placeholder with zeros written into it, or other zeros in its place."""
        if gradient is self._gradient and _versions(gradient) == self._versions:
            return False
        return not local_shard(gradient).any()


def is_placeholder(gradient: Tensor) -> bool:
    """Whether it is a placeholder: the gradient itself waits in the slots."""
    placeholder = getattr(gradient, _MARK, None)
    return placeholder is not None and not placeholder.was_zeroed(gradient)


def has_gradient(parameter: Tensor) -> bool:
    """Whether an update, a norm or a scaler would find a gradient."""
    return parameter.grad is not None and not is_placeholder(parameter.grad)


def _versions(gradient: Tensor) -> tuple[int, int]:
    return gradient._version, local_shard(gradient)._version
