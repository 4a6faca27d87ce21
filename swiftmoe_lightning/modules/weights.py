"""Experts' tensors as the operations take them. s slots."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def prepare_weights(weights: Mapping[str, Tensor], dtype: torch.dtype, transposed: bool) -> dict[str, Tensor]:
    """Cast experts' tensors to `dtype`, and turn matrices that are `transposed`, [s, in, out], into [s, out, in]."""
    cast = {name: w.to(dtype) for name, w in weights.items()}
    if transposed:
        cast = {name: w.transpose(1, 2) if w.dim() == 3 else w for name, w in cast.items()}
    return cast


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matmul of `x` would run: autocast's, if it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype
