"""Allocates and initializes the tensors that are still on the meta device once experts are sharded."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def materialize_dense(module: nn.Module, device: torch.device) -> None:
    """Allocate all meta parameters and buffers, and initialize them by their modules' `reset_parameters`.

    Raises:
        TypeError: for a module that has meta tensors and no `reset_parameters`.
    """
    for name, child in module.named_modules():
        tensors = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        if not any(tensor.is_meta for tensor in tensors):
            continue
        reset = getattr(child, "reset_parameters", None)
        if reset is None:
            raise TypeError(
                f"{name!r} ({type(child).__name__}) is on the meta device and has no reset_parameters() to draw its "
                "values with. Give it one, or build it outside the meta device."
            )
        child.to_empty(device=device, recurse=False)
        reset()
