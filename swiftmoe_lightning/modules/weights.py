"""Experts' tensors as the operations take them, and as checkpoints have them. s slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from swiftmoe_lightning.modules.adapters import Adapters
from swiftmoe_lightning.ops import is_factor

if TYPE_CHECKING:
    from swiftmoe_lightning.modules.experts import Experts


def prepare_weights(
    weights: Mapping[str, Tensor], dtype: torch.dtype, transposed: bool, adapters: Adapters | None = None
) -> dict[str, Tensor]:
    """Cast experts' tensors to `dtype`, and turn matrices that are `transposed`, [s, in, out], into [s, out, in].

    Factors of adapters are never transposed, and get their scale.
    """
    cast = {name: w.to(dtype) for name, w in weights.items()}
    if transposed:
        cast = {name: w.transpose(1, 2) if w.dim() == 3 and not is_factor(name) else w for name, w in cast.items()}
    return cast if adapters is None else adapters.scaled(cast)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matmul of `x` would run: autocast's, if it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return x.dtype


def check_loaded_shapes(experts: Experts, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Add to torch's message on a shape that differs which settings to look at."""
    for name, parameter in experts.expert_parameters().items():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            rest[-1].append(shape_message(prefix + name, value.shape, parameter.shape))


def shape_message(name: str, saved: torch.Size, expected: torch.Size) -> str:
    """The error message for a checkpoint in which `name` has another shape."""
    return (
        f"{name!r} has shape {list(saved)} in the checkpoint, and {list(expected)} in this model. Build the model "
        "with the checkpoint's num_experts, dim and hidden_dim, or load another checkpoint. (FAQ: another-model)"
    )
