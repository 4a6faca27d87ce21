"""Rows in fp8 (e4m3) with one scale each, packed for the wire. R rows, D features.

fp8 is written and read as whole numbers, bit by bit: so the kernels run on GPUs without fp8, and under the interpreter.
A program takes a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from swiftmoe_lightning.ops.quantize import SCALE_BYTES, largest_of
from swiftmoe_lightning.ops.triton.launch import column_block, device_of


def quantize_rows(x_RD: Tensor) -> Tensor:
    """[R, D + 4] uint8: `eager_quantize_rows`, the same bits where all numbers of a row are finite."""
    num_rows, dim = x_RD.shape
    packed = torch.empty(num_rows, dim + SCALE_BYTES, dtype=torch.uint8, device=x_RD.device)
    if num_rows == 0:
        return packed
    block, num_warps = column_block(dim, x_RD.element_size(), max_block=4096)
    with device_of(x_RD):
        quantize_kernel[(num_rows,)](x_RD.contiguous(), packed, D=dim, BLOCK_D=block, num_warps=num_warps)
    return packed


def dequantize_rows(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, D]: `eager_dequantize_rows`, the same bits."""
    num_rows, dim = len(packed), packed.shape[1] - SCALE_BYTES
    out_RD = torch.empty(num_rows, dim, dtype=dtype, device=packed.device)
    if num_rows == 0:
        return out_RD
    block, num_warps = column_block(dim, out_RD.element_size(), max_block=4096)
    with device_of(packed):
        dequantize_kernel[(num_rows,)](
            packed.contiguous(), out_RD, LARGEST=largest_of(dtype), D=dim, BLOCK_D=block, num_warps=num_warps
        )
    return out_RD


@triton.jit
def quantize_kernel(
    p_x,  # [R, D]
    p_packed,  # [R, D + 4]
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`quantize_rows` of a row. Of numbers without signs the largest has the largest bits; those of inf and nan are
    above all others."""
    row = tl.program_id(0).to(tl.int64)
    b_largest = tl.zeros([BLOCK_D], tl.int32)
    for start in range(0, D, BLOCK_D):
        b_d = start + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + row * D + b_d, mask=b_d < D, other=0.0).to(tl.float32)
        b_largest = tl.maximum(b_largest, b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    largest = tl.max(b_largest, axis=0)
    exponent = tl.maximum((largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32), 1)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    for start in range(0, D, BLOCK_D):
        b_d = start + tl.arange(0, BLOCK_D)
        b_x = tl.load(p_x + row * D + b_d, mask=b_d < D, other=0.0).to(tl.float32) * inverse
        b_bits = b_x.to(tl.int32, bitcast=True)
        b_size = b_bits & 0x7FFFFFFF
        # Half of what is cut off, so that ties go to the even one; and the bias of the exponent, 7 instead of 127.
        b_normal = ((b_size + 0x7FFFF + ((b_size >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 in steps of 2^-9, which are those of float32 from 2^14 on.
        b_tiny = (b_size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        b_fp8 = tl.where(b_size >= 0x3C800000, b_normal, b_tiny) | ((b_bits >> 24) & 0x80)
        tl.store(p_packed + row * (D + 4) + b_d, b_fp8.to(tl.uint8), mask=b_d < D)
    scale = tl.where(largest < 0x7F800000, exponent << 23, 0x7FC00000)
    b_byte = tl.arange(0, 4)
    tl.store(p_packed + row * (D + 4) + D + b_byte, ((scale >> (8 * b_byte)) & 0xFF).to(tl.uint8))


@triton.jit
def dequantize_kernel(
    p_packed,  # [R, D + 4]
    p_out,  # [R, D]
    LARGEST: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`dequantize_rows` of a row."""
    row = tl.program_id(0).to(tl.int64)
    b_byte = tl.arange(0, 4)
    b_scale = tl.load(p_packed + row * (D + 4) + D + b_byte).to(tl.int32) << (8 * b_byte)
    scale = tl.sum(b_scale, axis=0).to(tl.float32, bitcast=True)
    for start in range(0, D, BLOCK_D):
        b_d = start + tl.arange(0, BLOCK_D)
        b_fp8 = tl.load(p_packed + row * (D + 4) + b_d, mask=b_d < D, other=0).to(tl.int32)
        b_size = b_fp8 & 0x7F
        b_normal = ((b_size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        b_x = tl.where(b_size < 8, b_size.to(tl.float32) * 0.001953125, b_normal)
        b_x = tl.where(b_fp8 >= 0x80, -b_x, b_x) * scale
        # By comparisons, which nan fails: it stays.
        b_x = tl.where(b_x > LARGEST, LARGEST, tl.where(b_x < -LARGEST, -LARGEST, b_x))
        tl.store(p_out + row * D + b_d, b_x.to(p_out.dtype.element_ty), mask=b_d < D)
