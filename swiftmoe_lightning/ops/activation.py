"""The experts' activations, element by element.

R rows, F hidden dim.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from swiftmoe_lightning.config import check_choice
from swiftmoe_lightning.ops.backend import runs_eagerly, uses_triton
from swiftmoe_lightning.ops.common import choose_gradient, refuse_second_derivative, save_nothing, sum_dtype

ACTIVATIONS: Final = ("swiglu", "gelu", "relu2")
# One of `ACTIVATIONS`, or a function of rows: [R, 2F] (gated) or [R, F] -> [R, F].
Activation = str | Callable[[Tensor], Tensor]


def activate(z_RF: Tensor, activation: str) -> Tensor:
    """The experts' activation: [R, 2F] -> [R, F] for "swiglu" (the gate's half first), [R, F] -> [R, F] for others.

    Args:
        z_RF: [R, 2F] or [R, F] floating.
        activation: one of `ACTIVATIONS`.

    Raises:
        ValueError: for any other activation.
    """
    check_choice("activation", activation, ACTIVATIONS)
    assert activation != "swiglu" or z_RF.shape[1] % 2 == 0, z_RF.shape
    activate = _EagerActivate.apply if runs_eagerly(z_RF) else _activate
    return activate(z_RF, activation)


def eager_activate(z_RF: Tensor, activation: str) -> Tensor:
    """[R, F]: silu(gate) * up of z [R, 2F], the gate's half first (swiglu); else gelu (exact) or relu**2 of [R, F]."""
    wide_RF = z_RF.to(sum_dtype(z_RF))
    if activation == "swiglu":
        gate_RF, up_RF = wide_RF.chunk(2, dim=-1)
        out_RF = F.silu(gate_RF) * up_RF
    else:
        out_RF = F.gelu(wide_RF) if activation == "gelu" else F.relu(wide_RF).square()
    return out_RF.to(z_RF.dtype)


def eager_activate_backward(grad_RF: Tensor, z_RF: Tensor, activation: str) -> Tensor:
    """The gradient of z, in its shape.

    Args:
        grad_RF: [R, F], of the output.
        z_RF: the input of `activate`.
        activation: one of `ACTIVATIONS`.
    """
    wide_RF, grad_RF = z_RF.to(sum_dtype(z_RF)), grad_RF.to(sum_dtype(z_RF))
    if activation == "swiglu":
        gate_RF, up_RF = wide_RF.chunk(2, dim=-1)
        out_RF = torch.empty_like(wide_RF)
        grad_gate_RF, grad_up_RF = out_RF.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad_RF * up_RF, gate_RF, grad_input=grad_gate_RF)
        torch.mul(grad_RF, F.silu(gate_RF), out=grad_up_RF)
        return out_RF.to(z_RF.dtype)
    if activation == "gelu":
        below_RF = 0.5 * (1 + torch.erf(wide_RF * 0.5**0.5))
        density_RF = torch.exp(-0.5 * wide_RF.square()) * (2 * torch.pi) ** -0.5
        return (grad_RF * (below_RF + wide_RF * density_RF)).to(z_RF.dtype)
    return (grad_RF * 2 * F.relu(wide_RF)).to(z_RF.dtype)


class _EagerActivate(torch.autograd.Function):
    @staticmethod
    def forward(z_RF: Tensor, activation: str) -> Tensor:
        return eager_activate(z_RF, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: Tensor) -> None:
        z_RF, ctx.activation = inputs
        ctx.save_for_backward(z_RF)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, None]:
        (z_RF,) = ctx.saved_tensors
        backward = choose_gradient(_activate_backward, eager_activate_backward, grad_RF, z_RF)
        return backward(grad_RF, z_RF, ctx.activation), None


@torch.library.custom_op("swiftmoe::activate", mutates_args=())
def _activate(z_RF: Tensor, activation: str) -> Tensor:
    if uses_triton(z_RF):
        from swiftmoe_lightning.ops.triton import activation as kernels

        return kernels.activate(z_RF, activation)
    return eager_activate(z_RF, activation)


@_activate.register_fake
def _(z_RF: Tensor, activation: str) -> Tensor:
    return z_RF.new_empty(z_RF.shape[0], z_RF.shape[1] // (2 if activation == "swiglu" else 1))


@torch.library.custom_op("swiftmoe::activate_backward", mutates_args=())
def _activate_backward(grad_RF: Tensor, z_RF: Tensor, activation: str) -> Tensor:
    if uses_triton(z_RF):
        from swiftmoe_lightning.ops.triton import activation as kernels

        return kernels.activate_backward(grad_RF, z_RF, activation)
    return eager_activate_backward(grad_RF, z_RF, activation)


@_activate_backward.register_fake
def _(grad_RF: Tensor, z_RF: Tensor, activation: str) -> Tensor:
    return z_RF.new_empty(z_RF.shape)


_activate.register_autograd(_EagerActivate.backward, setup_context=_EagerActivate.setup_context)
_activate_backward.register_autograd(refuse_second_derivative, setup_context=save_nothing)
