"""Rows in fp8 (e4m3) with one scale each, packed for the wire.

R rows, D features. A packed row is D bytes of fp8 and the 4 bytes of its scale, so it travels as one. The scale is the
least power of two with which the row's largest number fits into fp8 (448). As a power of two it costs no precision, for
fp8 rounds relative to each number; it makes every unpacked number exact in float32, float16 and bfloat16; and a row
that is packed, unpacked and packed again is the same, so it may be sent on by a relay. (DeepSeek-V3, arXiv 2412.19437,
section 3.3.3, takes powers of two for the same reason.)
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from typing import Final

import torch
from torch import Tensor

from swiftmoe_lightning.ops.backend import choose_backend, needs_operator, uses_triton

SCALE_BYTES: Final = 4


def quantize_rows(x_RD: Tensor) -> Tensor:
    """Round rows to fp8, and pack each with its scale: [R, D] -> [R, D + 4] uint8.

    A number is rounded to 4 significant bits (to fewer below about 2^-14 of the row's largest, to zero below about
    2^-18). A row of zeros stays one. A row with a number that is not finite is nan throughout when it is unpacked, and
    so is a float64 row beyond float32's range.

    Args:
        x_RD: [R, D] floating, D >= 1.
    """
    quantize = _quantize_rows if needs_operator(x_RD) else _run_quantize
    packed: Tensor = quantize(x_RD)
    return packed


def dequantize_rows(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack rows: [R, D + 4] uint8 -> [R, D].

    Args:
        packed: of `quantize_rows`.
        dtype: of the result, floating. What rounding lifted above its range is its largest number.
    """
    dequantize = _dequantize_rows if needs_operator(packed) else _run_dequantize
    x_RD: Tensor = dequantize(packed, dtype)
    return x_RD


def eager_quantize_rows(x_RD: Tensor) -> Tensor:
    """`quantize_rows`."""
    x_RD = x_RD.to(torch.float32)
    largest_R = x_RD.abs().amax(1)
    bits_R = largest_R.view(torch.int32)
    # As an IEEE exponent. 448 is 1.75 * 2^8: a mantissa above 1.75 needs one more. At least that of the least normal
    # number, whose inverse is finite.
    exponent_R = ((bits_R >> 23) - 8 + ((bits_R & 0x7FFFFF) > 0x600000)).clamp_(min=1)
    scale_R = (exponent_R << 23).view(torch.float32).masked_fill(~largest_R.isfinite(), torch.nan)
    inverse_R = ((254 - exponent_R) << 23).view(torch.float32)
    fp8_RD = (x_RD * inverse_R.unsqueeze(1)).to(torch.float8_e4m3fn)
    return torch.cat([fp8_RD.view(torch.uint8), scale_R.unsqueeze(1).view(torch.uint8)], dim=1)


def eager_dequantize_rows(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantize_rows`."""
    fp8_RD = packed[:, :-SCALE_BYTES].contiguous().view(torch.float8_e4m3fn)
    # A copy, for float32 needs to begin at a multiple of 4 bytes.
    scale_R1 = packed[:, -SCALE_BYTES:].clone(memory_format=torch.contiguous_format).view(torch.float32)
    limit = largest_of(dtype)
    return (fp8_RD.to(torch.float32) * scale_R1).clamp_(-limit, limit).to(dtype)


def largest_of(dtype: torch.dtype) -> float:
    """The largest number of a dtype that float32 has, too."""
    return min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)


def _run_quantize(x_RD: Tensor) -> Tensor:
    if uses_triton(x_RD):
        from swiftmoe_lightning.ops.triton import quantize as kernels

        return kernels.quantize_rows(x_RD)
    return eager_quantize_rows(x_RD)


def _run_dequantize(packed: Tensor, dtype: torch.dtype) -> Tensor:
    if choose_backend(packed.device, dtype).name == "triton":
        from swiftmoe_lightning.ops.triton import quantize as kernels

        return kernels.dequantize_rows(packed, dtype)
    return eager_dequantize_rows(packed, dtype)


_quantize_rows = torch.library.custom_op("swiftmoe::quantize_rows", _run_quantize, mutates_args=())
_dequantize_rows = torch.library.custom_op("swiftmoe::dequantize_rows", _run_dequantize, mutates_args=())


@_quantize_rows.register_fake
def _(x_RD: Tensor) -> Tensor:
    return x_RD.new_empty(x_RD.shape[0], x_RD.shape[1] + SCALE_BYTES, dtype=torch.uint8)


@_dequantize_rows.register_fake
def _(packed: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], packed.shape[1] - SCALE_BYTES, dtype=dtype)
