"""Leaves padding out of a block's computation. T real tokens, N all tokens, D model dim."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RealTokens:
    """The tokens of an input that are not padding.

    Args:
        x: [..., D], of N tokens.
        mask: [...] bool, true for real tokens; None takes all. Their number is waited for.

    Raises:
        TypeError: for a mask that is not bool.
        ValueError: for a mask of another shape than the tokens.
    """

    def __init__(self, x: Tensor, mask: Tensor | None) -> None:
        self._shape, self._kept_T = x.shape[:-1], None
        if mask is None:
            return
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, true for tokens and false for padding, got {mask.dtype}: mask.bool()?")
        self._check(mask, "mask")
        self._kept_T = _places(mask)

    def pick(self, values: Tensor, name: str) -> Tensor:
        """The values of the real tokens, [..., *] -> [T, *].

        Args:
            values: one for each of the N tokens, or a vector.
            name: theirs, for the message.

        Raises:
            ValueError: for another shape than the tokens'.
        """
        self._check(values, name)
        flat_N = values.reshape(math.prod(self._shape), *values.shape[len(self._shape) :])
        return flat_N if self._kept_T is None else flat_N.index_select(0, self._kept_T)

    def put_back(self, out_TD: Tensor) -> Tensor:
        """[T, D] -> [..., D], zero for padding."""
        if self._kept_T is not None:
            out_ND = out_TD.new_zeros(math.prod(self._shape), out_TD.shape[1])
            out_TD = out_ND.index_copy(0, self._kept_T, out_TD)
        return out_TD.reshape(*self._shape, out_TD.shape[1])

    def _check(self, values: Tensor, name: str) -> None:
        if values.shape[: len(self._shape)] != self._shape:
            raise ValueError(f"{name} must have the tokens' shape, {list(self._shape)}, got {list(values.shape)}.")


# torch.compile cannot trace sizes that depend on values.
@torch.compiler.disable
def _places(mask: Tensor) -> Tensor:
    return mask.reshape(-1).nonzero().squeeze(-1)
