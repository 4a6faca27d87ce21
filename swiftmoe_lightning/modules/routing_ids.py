"""Recorded expert ids: compact, checked, and as arrays. T tokens, E experts, K top-k, L layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def compact_ids(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Ids in the smallest unsigned dtype that holds 0..E; its largest value stands for -1.

    Args:
        ids_TK: [T, K] int; those outside 0..E-1 are unassigned.
        num_experts: E.
    """
    dtype = next(d for d in (torch.uint8, torch.uint16, torch.uint32) if torch.iinfo(d).max >= num_experts)
    ids_TK = ids_TK.detach().to(torch.int64)
    return ids_TK.masked_fill((ids_TK < 0) | (ids_TK >= num_experts), torch.iinfo(dtype).max).to(dtype)


def signed_ids(ids_TK: Tensor, num_experts: int = 0) -> Tensor:
    """The inverse of `compact_ids`: [T, K] int64, -1 for what is not there. Signed ids are taken as they are.

    Args:
        ids_TK: [T, K] int.
        num_experts: E; it need not be known of what `compact_ids` returned.
    """
    wide_TK = ids_TK.to(torch.int64)
    most = torch.iinfo(ids_TK.dtype).max
    if ids_TK.dtype.is_signed or most < num_experts:
        return wide_TK
    return wide_TK.masked_fill(wide_TK == most, -1)


def check_recording(name: str, ids_TK: Tensor, num_experts: int) -> None:
    """Check one layer's recording.

    Args:
        name: of the layer, for messages.
        ids_TK: [T, K] int.
        num_experts: E.

    Raises:
        TypeError: for what is no tensor of integers.
        ValueError: for another shape, ids that are no experts, or rows that name an expert twice or are missing in
            part.
    """
    if not isinstance(ids_TK, Tensor) or ids_TK.is_floating_point() or ids_TK.dtype == torch.bool:
        kind = ids_TK.dtype if isinstance(ids_TK, Tensor) else type(ids_TK).__name__
        raise TypeError(
            f"the recording of {name!r} must be a tensor of integers [tokens, top_k], got {kind}. (FAQ: routing-replay)"
        )
    if ids_TK.dim() != 2:
        raise ValueError(
            f"the recording of {name!r} must have shape [tokens, top_k], got {list(ids_TK.shape)}. Flatten batch and "
            "sequence. (FAQ: routing-replay)"
        )
    wide_TK = signed_ids(ids_TK, num_experts)
    ordered_TK = wide_TK.sort(-1).values
    is_missing_TK = wide_TK < 0
    is_foreign_T = ((wide_TK < -1) | (wide_TK >= num_experts)).any(-1)
    is_partial_T = is_missing_TK.any(-1) & ~is_missing_TK.all(-1)
    is_double_T = ((ordered_TK[:, 1:] == ordered_TK[:, :-1]) & (ordered_TK[:, 1:] >= 0)).any(-1)
    is_wrong_T = is_foreign_T | is_partial_T | is_double_T
    if not is_wrong_T.any():
        return
    token = int(is_wrong_T.int().argmax())
    raise ValueError(
        f"token {token} of the recording of {name!r} has experts {wide_TK[token].tolist()}: needed are different ones "
        f"of 0..{num_experts - 1}, or -1 for all of a token that has no recording (unfilled rows are often zeros). "
        "(FAQ: routing-replay)"
    )


def as_integers(array: np.ndarray | Tensor) -> Tensor:
    """An array [T, L, K] as a tensor of int64.

    Args:
        array: of integers of any kind.

    Raises:
        TypeError: for other numbers.
        ValueError: for another number of dims.
    """
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"recorded expert ids must be integers, got {tensor.dtype}. (FAQ: routing-replay)")
    if tensor.dim() != 3:
        raise ValueError(
            f"recorded expert ids must have shape [tokens, layers, top_k], got {list(tensor.shape)}. Flatten batch and "
            "sequence into tokens. (FAQ: routing-replay)"
        )
    return tensor.to(torch.int64)
