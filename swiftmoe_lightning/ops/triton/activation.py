"""The experts' activations, element by element, in float32.

R rows, F hidden dim. swiglu takes [R, 2F], the gate's half first; gelu (exact) and relu2 take [R, F].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.triton.launch import block_of_program, launch_by_block


def activate(z_RF: Tensor, activation: str) -> Tensor:
    """[R, F]: `eager_activate`."""
    num_rows, dim = len(z_RF), z_RF.shape[1] // (2 if activation == "swiglu" else 1)
    out_RF = torch.empty(num_rows, dim, dtype=z_RF.dtype, device=z_RF.device)
    if out_RF.numel():
        launch_by_block(activate_kernel, out_RF, (z_RF.contiguous(), out_RF), ACTIVATION=activation)
    return out_RF


def activate_backward(grad_RF: Tensor, z_RF: Tensor, activation: str) -> Tensor:
    """The gradient of z, in its shape: `eager_activate_backward`."""
    grad_z_RF = torch.empty(z_RF.shape, dtype=z_RF.dtype, device=z_RF.device)
    if grad_z_RF.numel():
        tensors = (z_RF.contiguous(), grad_z_RF, grad_RF.contiguous())
        launch_by_block(activate_backward_kernel, grad_RF, tensors, ACTIVATION=activation)
    return grad_z_RF


@triton.jit
def silu_and_slope(gate):
    """silu(gate), and its derivative. gate: float32."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return silu, sigmoid + silu * (1 - sigmoid)


@triton.jit
def value_and_slope(z, ACTIVATION: tl.constexpr):
    """An activation without a gate, and its derivative. z: float32; nan stays nan."""
    if ACTIVATION == "gelu":
        # 0.3989... is 1 / sqrt(2 pi), the normal density's factor.
        cumulative = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        value = z * cumulative
        slope = cumulative + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        # Not a maximum, which would turn nan into 0.
        value = tl.where(z <= 0, 0.0, z * z)
        slope = tl.where(z <= 0, 0.0, 2 * z)
    return value, slope


@triton.jit
def activate_kernel(
    p_z,  # [R, 2F] for swiglu, else [R, F]
    p_out,  # [R, F]
    num_rows,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`activate` of a block of rows and columns."""
    b_r, b_f, m = block_of_program(num_rows, F, BLOCK_R, BLOCK_F)
    if ACTIVATION == "swiglu":
        b_gate = tl.load(p_z + b_r * (2 * F) + b_f, mask=m, other=0.0).to(tl.float32)
        b_up = tl.load(p_z + b_r * (2 * F) + F + b_f, mask=m, other=0.0).to(tl.float32)
        b_silu, _ = silu_and_slope(b_gate)
        b_out = b_silu * b_up
    else:
        b_z = tl.load(p_z + b_r * F + b_f, mask=m, other=0.0).to(tl.float32)
        b_out, _ = value_and_slope(b_z, ACTIVATION)
    tl.store(p_out + b_r * F + b_f, b_out, mask=m)


@triton.jit
def activate_backward_kernel(
    p_z,  # [R, 2F] for swiglu, else [R, F]
    p_grad_z,  # as p_z
    p_grad,  # [R, F]
    num_rows,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """`activate_backward` of a block of rows and columns."""
    b_r, b_f, m = block_of_program(num_rows, F, BLOCK_R, BLOCK_F)
    b_grad = tl.load(p_grad + b_r * F + b_f, mask=m, other=0.0).to(tl.float32)
    if ACTIVATION == "swiglu":
        b_gate = tl.load(p_z + b_r * (2 * F) + b_f, mask=m, other=0.0).to(tl.float32)
        b_up = tl.load(p_z + b_r * (2 * F) + F + b_f, mask=m, other=0.0).to(tl.float32)
        b_silu, b_slope = silu_and_slope(b_gate)
        tl.store(p_grad_z + b_r * (2 * F) + b_f, b_grad * b_up * b_slope, mask=m)
        tl.store(p_grad_z + b_r * (2 * F) + F + b_f, b_grad * b_silu, mask=m)
    else:
        b_z = tl.load(p_z + b_r * F + b_f, mask=m, other=0.0).to(tl.float32)
        _, b_slope = value_and_slope(b_z, ACTIVATION)
        tl.store(p_grad_z + b_r * F + b_f, b_grad * b_slope, mask=m)
