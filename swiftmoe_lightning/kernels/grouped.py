"""The experts' feed-forward over rows sorted by slot, around torch's grouped matmul.

R rows, s slots, D model dim, F hidden dim, O / I out and in features of one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.kernels import reference
from swiftmoe_lightning.kernels.ops import activate
from swiftmoe_lightning.kernels.reference import Activation


def expert_mlp(x_RD: Tensor, weights: Mapping[str, Tensor], ends_s: Tensor, activation: Activation) -> Tensor:
    """[R, D] -> [R, D]: down(act(up(x))), each row with its own slot's matrices.

    weights: `gate_up_proj [s, 2F, D]` (gated) or `up_proj [s, F, D]`, and `down_proj [s, D, F]`; each may have a
        `..._bias` [s, O] beside it.
    ends_s: [s] int32, the end of each slot's rows; the last one is R.
    """
    first = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
    z_R = grouped_linear(x_RD, weights[first], ends_s, weights.get(f"{first}_bias"))
    hidden_RF = activation(z_R) if callable(activation) else activate(z_R, activation)
    return grouped_linear(hidden_RF, weights["down_proj"], ends_s, weights.get("down_proj_bias"))


def grouped_linear(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor, bias_sO: Tensor | None = None) -> Tensor:
    """[R, I] -> [R, O], as `reference.grouped_linear`, by `F.grouped_mm` where it takes this dtype and these sizes."""
    if not _fits_grouped_mm(x_RI, weight_sOI):
        return reference.grouped_linear(x_RI, weight_sOI, ends_s, bias_sO)
    y_RO: Tensor = _ContiguousGradient.apply(F.grouped_mm(x_RI, weight_sOI.transpose(-2, -1), offs=ends_s))
    if bias_sO is None:
        return y_RO
    slot_R = torch.searchsorted(ends_s, torch.arange(len(x_RI), device=x_RI.device, dtype=torch.int32), right=True)
    return y_RO + bias_sO[slot_R]


class _ContiguousGradient(torch.autograd.Function):
    """Forward: nothing. Backward: an expanded gradient (as of `y.sum()`) gets real strides, which grouped_mm needs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


def _fits_grouped_mm(x_RI: Tensor, weight_sOI: Tensor) -> bool:
    """Rows must start at multiples of 16 bytes, there must be a row, and float64 is refused."""
    aligned = all(features * x_RI.element_size() % 16 == 0 for features in weight_sOI.shape[1:])
    return aligned and len(x_RI) > 0 and x_RI.dtype in (torch.float32, torch.bfloat16, torch.float16)
