"""The experts' biases, added to rows sorted by slot.

R rows, s slots, O out features of one matrix. Rows behind the last end are unassigned.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.ops.backend import runs_eagerly, uses_triton
from swiftmoe_lightning.ops.common import choose_gradient, refuse_second_derivative, save_nothing


def add_bias(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    """Add to each row its slot's bias: [R, O] -> [R, O].

    Args:
        y_RO: [R, O] floating, sorted by slot.
        bias_sO: [s, O], of `y_RO`'s dtype.
        ends_s: [s] int32, the end of each slot's rows.
    """
    add = _EagerAddBias.apply if runs_eagerly(y_RO, bias_sO) else _add_bias
    out_RO: Tensor = add(y_RO, bias_sO, ends_s)
    return out_RO


def eager_add_bias(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    """Adds to each row its slot's bias, and any bias to rows behind the last end. Backward: `eager_bias_gradient`."""
    if len(y_RO) == 0:
        return torch.empty_like(y_RO)
    slot_R = slots_of(ends_s, len(y_RO)).clamp(max=len(ends_s) - 1)
    return bias_sO.index_select(0, slot_R).add_(y_RO)


def eager_bias_gradient(grad_RO: Tensor, ends_s: Tensor) -> Tensor:
    """[s, O]: the sum of each slot's rows, without a wait for a GPU."""
    if len(grad_RO) == 0:
        return grad_RO.new_zeros(len(ends_s), grad_RO.shape[1])
    row_R = torch.arange(len(grad_RO), device=grad_RO.device)
    # One more bag, dropped at the end, for unassigned rows.
    return F.embedding_bag(row_R, grad_RO, F.pad(ends_s.to(torch.int64), (1, 0)), mode="sum")[:-1]


def slots_of(ends_s: Tensor, num_rows: int) -> Tensor:
    """The slot of each row.

    Args:
        ends_s: [s] int32, the end of each slot's rows.
        num_rows: R.

    Returns:
        [R] int32; s for unassigned.
    """
    rows_R = torch.arange(num_rows, device=ends_s.device, dtype=torch.int32)
    return torch.searchsorted(ends_s, rows_R, right=True, out_int32=True)


class _EagerAddBias(torch.autograd.Function):
    @staticmethod
    def forward(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
        return eager_add_bias(y_RO, bias_sO, ends_s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, _, ends_s = inputs
        ctx.save_for_backward(ends_s)

    @staticmethod
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (ends_s,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad_RO, None, None
        return grad_RO, choose_gradient(_bias_gradient, eager_bias_gradient, grad_RO)(grad_RO, ends_s), None


@torch.library.custom_op("swiftmoe::add_bias", mutates_args=())
def _add_bias(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    if uses_triton(y_RO, bias_sO):
        from swiftmoe_lightning.ops.triton import bias as kernels

        return kernels.add_bias(y_RO, bias_sO, slots_of(ends_s, len(y_RO)))
    return eager_add_bias(y_RO, bias_sO, ends_s)


@_add_bias.register_fake
def _(y_RO: Tensor, bias_sO: Tensor, ends_s: Tensor) -> Tensor:
    return y_RO.new_empty(y_RO.shape)


@torch.library.custom_op("swiftmoe::bias_gradient", mutates_args=())
def _bias_gradient(grad_RO: Tensor, ends_s: Tensor) -> Tensor:
    if uses_triton(grad_RO):
        from swiftmoe_lightning.ops.triton import bias as kernels

        return kernels.bias_gradient(grad_RO, ends_s)
    return eager_bias_gradient(grad_RO, ends_s)


@_bias_gradient.register_fake
def _(grad_RO: Tensor, ends_s: Tensor) -> Tensor:
    return grad_RO.new_empty(ends_s.shape[0], grad_RO.shape[1])


_add_bias.register_autograd(_EagerAddBias.backward, setup_context=_EagerAddBias.setup_context)
_bias_gradient.register_autograd(refuse_second_derivative, setup_context=save_nothing)
