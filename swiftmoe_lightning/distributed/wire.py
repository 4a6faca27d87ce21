"""The numbers in which rows of tokens travel between ranks: as they are, in bfloat16, or in fp8 with a scale each.

R rows, D features. Rows that stay on their rank are rounded like those that leave it, so that no token's result depends
on where its experts are. Gradients take rounding as the identity (straight through).
"""

from __future__ import annotations

import torch
from torch import Tensor

from swiftmoe_lightning.ops import SCALE_BYTES, dequantize_rows, quantize_rows

FP8 = torch.float8_e4m3fn


def returned_dtype(token_dtype: torch.dtype | None) -> torch.dtype | None:
    """In which results travel back, and all gradients: bfloat16 also where tokens travel in fp8.

    Gradients have a wider range than tokens, and a token's results are summed up: DeepSeek-V3 (arXiv 2412.19437,
    section 3.3.3), too, keeps what it combines in bfloat16.

    Args:
        token_dtype: in which tokens travel to their experts; None is as they are.
    """
    return None if token_dtype is None else torch.bfloat16


def pack_rows(rows_RD: Tensor, dtype: torch.dtype | None) -> Tensor:
    """What is sent for rows: [R, D] in their own dtype or bfloat16, or [R, D + 4] uint8 for fp8; contiguous.

    Args:
        rows_RD: [R, D]. Rows of 16 bits stay as they are under bfloat16: float16 is as narrow.
        dtype: None, bfloat16 or float8_e4m3fn.
    """
    if dtype == FP8:
        return quantize_rows(rows_RD)
    return (rows_RD if _travels_as_is(rows_RD.dtype, dtype) else rows_RD.to(dtype)).contiguous()


def unpack_rows(packed: Tensor, dtype: torch.dtype | None, rows_dtype: torch.dtype) -> Tensor:
    """The rows of `pack_rows`, [R, D], in `rows_dtype` again."""
    if dtype == FP8:
        return dequantize_rows(packed, rows_dtype)
    return packed.to(rows_dtype)


def packed_bytes(dim: int, rows_dtype: torch.dtype, dtype: torch.dtype | None) -> int:
    """Bytes of one packed row.

    Args:
        dim: D.
        rows_dtype: of the rows before.
        dtype: as in `pack_rows`.
    """
    if dtype == FP8:
        return dim + SCALE_BYTES
    return dim * min(rows_dtype.itemsize, (dtype or rows_dtype).itemsize)


def _travels_as_is(rows_dtype: torch.dtype, dtype: torch.dtype | None) -> bool:
    return dtype is None or rows_dtype.itemsize <= dtype.itemsize
