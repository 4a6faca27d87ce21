"""The experts' feed-forward over rows sorted by slot, around torch's grouped matmul.

R rows, s slots, D model dim, F hidden dim, O / I out and in features of one matrix. Rows behind the last end are
unassigned: what they hold, and what their gradients hold, is undefined, and reaches nobody else's.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.ops import reference
from swiftmoe_lightning.ops.operators import (
    activate,
    backward_of,
    is_plain,
    keep_inputs,
    keep_nothing,
    keep_third,
    on_triton,
    plain_function,
    refuse_second_derivative,
)
from swiftmoe_lightning.ops.reference import Activation


def expert_mlp(x_RD: Tensor, weights: Mapping[str, Tensor], ends_s: Tensor, activation: Activation) -> Tensor:
    """[R, D] -> [R, D]: down(act(up(x))), each row with its own slot's matrices.

    Args:
        x_RD: [R, D] floating, sorted by slot.
        weights: `gate_up_proj [s, 2F, D]` (gated) or `up_proj [s, F, D]`, and `down_proj [s, D, F]`; each may have a
            `..._bias` [s, O] beside it.
        ends_s: [s] int32, the end of each slot's rows; the last one is R.
        activation: one of `ACTIVATIONS`, or a function of rows.

    Raises:
        ValueError: for an activation that is neither.
    """
    first = "gate_up_proj" if "gate_up_proj" in weights else "up_proj"
    z_R = grouped_linear(x_RD, weights[first], ends_s, weights.get(f"{first}_bias"))
    hidden_RF = activation(z_R) if callable(activation) else activate(z_R, activation)
    return grouped_linear(hidden_RF, weights["down_proj"], ends_s, weights.get("down_proj_bias"))


def grouped_linear(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor, bias_sO: Tensor | None = None) -> Tensor:
    """[R, I] -> [R, O], as `reference.grouped_linear`, by `F.grouped_mm` where it takes this dtype and these sizes.

    Args:
        x_RI: [R, I] floating, sorted by slot.
        weight_sOI: [s, O, I], of `x_RI`'s dtype.
        ends_s: [s] int32, the end of each slot's rows.
        bias_sO: [s, O], added to the slot's rows; None adds nothing.
    """
    if torch.compiler.is_compiling():
        y_RO: Tensor = _grouped_product(x_RI, weight_sOI, ends_s)
    elif _fits_grouped_mm(x_RI, weight_sOI):
        y_RO = _ContiguousGradient.apply(F.grouped_mm(x_RI, weight_sOI.transpose(-2, -1), offs=ends_s))
    else:
        y_RO = reference.grouped_linear(x_RI, weight_sOI, ends_s)
    return y_RO if bias_sO is None else add_bias(y_RO, bias_sO, ends_s)


def add_bias(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    """[R, O]: each row with its own slot's bias.

    Args:
        y_RO: [R, O] floating, sorted by slot.
        bias_sO: [s, O], of `y_RO`'s dtype.
        ends_s: [s] int32, the end of each slot's rows.
    """
    add = _PlainAddBias.apply if is_plain(y_RO, (y_RO, bias_sO)) else _add_bias
    out_RO: Tensor = add(y_RO, bias_sO, ends_s)
    return out_RO


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


# For the compiler, which has no fake of `F.grouped_mm` but in bfloat16, and cannot loop over sizes it does not know.
@torch.library.custom_op("swiftmoe::grouped_product", mutates_args=())
def _grouped_product(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> Tensor:
    if _fits_grouped_mm(x_RI, weight_sOI):
        return F.grouped_mm(x_RI, weight_sOI.transpose(-2, -1), offs=ends_s)
    return reference.grouped_linear(x_RI, weight_sOI, ends_s)


@_grouped_product.register_fake
def _(x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_sOI.shape[1])


@torch.library.custom_op("swiftmoe::grouped_product_backward", mutates_args=())
def _grouped_product_backward(
    grad_RO: Tensor, x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor
) -> tuple[Tensor, Tensor]:
    if _fits_grouped_mm(x_RI, weight_sOI):
        grad_RO = grad_RO.contiguous()
        return F.grouped_mm(grad_RO, weight_sOI, offs=ends_s), F.grouped_mm(grad_RO.t(), x_RI, offs=ends_s)
    return reference.grouped_linear_backward(grad_RO, x_RI, weight_sOI, ends_s)


@_grouped_product_backward.register_fake
def _(grad_RO: Tensor, x_RI: Tensor, weight_sOI: Tensor, ends_s: Tensor) -> tuple[Tensor, Tensor]:
    return x_RI.new_empty(x_RI.shape), weight_sOI.new_empty(weight_sOI.shape)


@torch.library.custom_op("swiftmoe::add_bias", mutates_args=())
def _add_bias(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    if on_triton(y_RO, bias_sO):
        from swiftmoe_lightning.ops.triton import bias

        return bias.add_bias(y_RO, bias_sO, reference.slots_of(ends_s, len(y_RO)))
    return reference.add_bias(y_RO, bias_sO, ends_s)


@_add_bias.register_fake
def _(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    return y_RO.new_empty(y_RO.shape)


@torch.library.custom_op("swiftmoe::slot_sums", mutates_args=())
def _slot_sums(rows_RO: Tensor, ends_s: Tensor) -> Tensor:
    if on_triton(rows_RO):
        from swiftmoe_lightning.ops.triton import bias

        return bias.bias_gradient(rows_RO, ends_s)
    return reference.slot_sums(rows_RO, ends_s)


@_slot_sums.register_fake
def _(rows_RO: Tensor, ends_s: Tensor) -> Tensor:
    return rows_RO.new_empty(ends_s.shape[0], rows_RO.shape[1])


def _gradient(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_grouped_product_backward(grad_RO, *ctx.saved_tensors), None


def _add_bias_gradient(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor | None, None]:
    sums = backward_of(ctx, _slot_sums, reference.slot_sums)
    return grad_RO, sums(grad_RO, *ctx.saved_tensors) if ctx.needs_input_grad[1] else None, None


_grouped_product.register_autograd(_gradient, setup_context=keep_inputs)
_add_bias.register_autograd(_add_bias_gradient, setup_context=keep_third)
for _operator in (_grouped_product_backward, _slot_sums):
    _operator.register_autograd(refuse_second_derivative, setup_context=keep_nothing)
_PlainAddBias = plain_function(reference.add_bias, keep_third, _add_bias_gradient)
