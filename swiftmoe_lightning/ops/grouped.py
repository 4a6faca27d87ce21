"""The experts' feed-forward over rows sorted by slot, around torch's grouped matmul.

R rows, s slots, D model dim, F hidden dim, O / I out and in features of one matrix, r rank of an adapter. Rows behind
the last end are unassigned: their values and gradients are undefined, and do not reach those of other rows.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.ops.activation import Activation, activate
from swiftmoe_lightning.ops.bias import add_bias
from swiftmoe_lightning.ops.common import refuse_second_derivative, save_nothing
from swiftmoe_lightning.ops.memory import reused_empty


def is_factor(name: str) -> bool:
    """Whether a tensor of experts is a factor of a low-rank adapter."""
    return name.endswith(("_lora_A", "_lora_B"))


def expert_mlp(x_RD: Tensor, weights: Mapping[str, Tensor], ends_s: Tensor, activation: Activation) -> Tensor:
    """[R, D] -> [R, D]: down(act(up(x))), each row with its own slot's matrices.

    Args:
        x_RD: [R, D] floating, sorted by slot.
        weights: `gate_up_proj [s, 2F, D]` (gated) or `up_proj [s, F, D]`, and `down_proj [s, D, F]`; each may have a
            `..._bias` [s, O] beside it, and the factors of a low-rank adapter, `..._lora_A` [s, r, I] and
            `..._lora_B` [s, O, r].
        ends_s: [s] int32, the end of each slot's rows; the last one is R.
        activation: one of `ACTIVATIONS`, or a function of rows.

    Raises:
        ValueError: for an activation that is neither.
    """
    up_name = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
    z_R = _projection(x_RD, weights, up_name, ends_s)
    hidden_RF = activation(z_R) if callable(activation) else activate(z_R, activation)
    return _projection(hidden_RF, weights, "down_proj", ends_s)


def _projection(x_RI: Tensor, weights: Mapping[str, Tensor], name: str, ends_s: Tensor) -> Tensor:
    """[R, I] -> [R, O]: the matrix `name`, its bias and its low-rank adapter, as far as there are any."""
    y_RO = grouped_linear(x_RI, weights[name], ends_s, weights.get(f"{name}_bias"))
    if f"{name}_lora_A" not in weights:
        return y_RO
    low_Rr = grouped_linear(x_RI, weights[f"{name}_lora_A"], ends_s)
    return y_RO + grouped_linear(low_Rr, weights[f"{name}_lora_B"], ends_s)


def grouped_linear(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor, bias_sO: Tensor | None = None) -> Tensor:
    """[R, I] -> [R, O], as `eager_grouped_linear`, by `F.grouped_mm` where it takes this dtype and these sizes.

    Args:
        x_RI: [R, I] floating, sorted by slot.
        weight_sOI: [s, O, I], of `x_RI`'s dtype.
        ends_s: [s] int32, the end of each slot's rows.
        bias_sO: [s, O], added to the slot's rows; None adds nothing.
    """
    if torch.compiler.is_compiling():
        y_RO: Tensor = _grouped_linear(x_RI, weight_sOI, ends_s)
    elif _fits_grouped_mm(x_RI, weight_sOI):
        y_RO = _GroupedMM.apply(x_RI, weight_sOI, ends_s)
    else:
        y_RO = eager_grouped_linear(x_RI, weight_sOI, ends_s)
    return y_RO if bias_sO is None else add_bias(y_RO, bias_sO, ends_s)


def eager_grouped_linear(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> Tensor:
    """Each slot's matrix times its own rows, one slot after the other.

    Args:
        x_RI: [R, I], sorted by slot.
        weight_sOI: [s, O, I].
        ends_s: [s] int32, the end of each slot's rows in `x_RI`.

    Returns:
        [R, O], zero behind the last end.
    """
    parts = [F.linear(x, w) for x, w in zip(_by_slot(x_RI, ends_s), weight_sOI.unbind(0), strict=True)]
    return _filled(parts, len(x_RI))


def eager_grouped_linear_backward(
    grad_RO: Tensor, x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows, [R, I], and of the matrices, [s, O, I]."""
    grads, parts = _by_slot(grad_RO, ends_s), _by_slot(x_RI, ends_s)
    grad_x_RI = _filled([g @ w for g, w in zip(grads, weight_sOI.unbind(0), strict=True)], len(x_RI))
    return grad_x_RI, torch.stack([g.T @ x for g, x in zip(grads, parts, strict=True)])


def _by_slot(rows_R: Tensor, ends_s: Tensor) -> tuple[Tensor, ...]:
    ends = ends_s.tolist()
    return rows_R[: ends[-1]].tensor_split(ends[:-1])


def _filled(parts: list[Tensor], num_rows: int) -> Tensor:
    """The parts in one tensor, zero behind them."""
    missing = num_rows - sum(map(len, parts))
    return torch.cat([*parts, parts[0].new_zeros(missing, parts[0].shape[1])])


class _GroupedMM(torch.autograd.Function):
    """`F.grouped_mm` with a gradient of the matrices in memory that is there already."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> Tensor:
        ctx.save_for_backward(x_RI, weight_sOI, ends_s)
        return F.grouped_mm(x_RI, weight_sOI.transpose(-2, -1), offs=ends_s)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RI, weight_sOI, ends_s = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_grouped_linear_backward(grad_RO, x_RI, weight_sOI, ends_s), None
        # grouped_mm refuses an expanded gradient, as `y.sum()` gives.
        grad_RO = grad_RO.contiguous()
        grad_x_RI = F.grouped_mm(grad_RO, weight_sOI, offs=ends_s) if ctx.needs_input_grad[0] else None
        grad_weight_sOI = _matrix_gradient(grad_RO, x_RI, ends_s) if ctx.needs_input_grad[1] else None
        return grad_x_RI, grad_weight_sOI, None


def _matrix_gradient(grad_RO: Tensor, x_RI: Tensor, ends_s: Tensor) -> Tensor:
    """[s, O, I]: each slot's product of its rows' gradients and its rows."""
    if x_RI.device.type != "cpu":
        return F.grouped_mm(grad_RO.t(), x_RI, offs=ends_s)
    grad_sOI = reused_empty((len(ends_s), grad_RO.shape[1], x_RI.shape[1]), x_RI.dtype, x_RI.device)
    for grad_OI, grad, rows in zip(grad_sOI, _by_slot(grad_RO, ends_s), _by_slot(x_RI, ends_s), strict=True):
        torch.mm(grad.t(), rows, out=grad_OI)
    return grad_sOI


def _fits_grouped_mm(x_RI: Tensor, weight_sOI: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these: rows that start at multiples of 16 bytes, at least one, not in float64."""
    aligned = all(features * x_RI.element_size() % 16 == 0 for features in weight_sOI.shape[1:])
    return aligned and len(x_RI) > 0 and x_RI.dtype in (torch.float32, torch.bfloat16, torch.float16)


# Only for torch.compile: `F.grouped_mm` has a fake in bfloat16 alone, and the eager loop is over sizes in a tensor.
@torch.library.custom_op("swiftmoe::grouped_linear", mutates_args=())
def _grouped_linear(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> Tensor:
    if _fits_grouped_mm(x_RI, weight_sOI):
        return F.grouped_mm(x_RI, weight_sOI.transpose(-2, -1), offs=ends_s)
    return eager_grouped_linear(x_RI, weight_sOI, ends_s)


@_grouped_linear.register_fake
def _(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_sOI.shape[1])


@torch.library.custom_op("swiftmoe::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_RO: Tensor, x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor
) -> tuple[Tensor, Tensor]:
    if _fits_grouped_mm(x_RI, weight_sOI):
        grad_RO = grad_RO.contiguous()
        return F.grouped_mm(grad_RO, weight_sOI, offs=ends_s), F.grouped_mm(grad_RO.t(), x_RI, offs=ends_s)
    return eager_grouped_linear_backward(grad_RO, x_RI, weight_sOI, ends_s)


@_grouped_linear_backward.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> tuple[Tensor, Tensor]:
    return x_RI.new_empty(x_RI.shape), weight_sOI.new_empty(weight_sOI.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    x_RI, weight_sOI, ends_s = ctx.saved_tensors
    return *_grouped_linear_backward(grad_RO, x_RI, weight_sOI, ends_s), None


_grouped_linear.register_autograd(_backward, setup_context=_save_for_backward)
_grouped_linear_backward.register_autograd(refuse_second_derivative, setup_context=save_nothing)
