"""Leaves padding out of a block's computation. T real tokens, N all tokens, D model dim."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class RealTokens:
    """The tokens of a block's input that are not padding.

    Args:
        x: [..., D], of N tokens.
        mask: [...] bool, true for real tokens; None takes all. Their number is waited for.
        token_ids: [...] int, or None.
        cluster_ids: [...] int, or of that shape without its last dim, one for each sequence; or None.

    Attributes:
        x_TD: [T, D].
        ids: what a router gets beside it, ([T] int,), or nothing.
        clusters: and by name, {"cluster_ids_T": [T] int}, or nothing.

    Raises:
        TypeError: for a mask that is not bool.
        ValueError: for a mask, token_ids or cluster_ids of another shape than that of the tokens or sequences.
    """

    def __init__(
        self, x: Tensor, mask: Tensor | None, token_ids: Tensor | None, cluster_ids: Tensor | None = None
    ) -> None:
        self._shape = x.shape
        x_ND = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        ids = [] if token_ids is None else [self._flat("token_ids", token_ids)]
        clusters = {} if cluster_ids is None else {"cluster_ids_T": self._of_each_token(cluster_ids)}
        self._places_T = None
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask must be bool, true for tokens, got {mask.dtype}. Pass mask.bool().")
            self._places_T = _places(self._flat("mask", mask))
            x_ND, *ids = (values_N.index_select(0, self._places_T) for values_N in (x_ND, *ids))
            clusters = {name: ids_N.index_select(0, self._places_T) for name, ids_N in clusters.items()}
        self.x_TD, self.ids, self.clusters = x_ND, tuple(ids), clusters

    def put_back(self, out_TD: Tensor) -> Tensor:
        """[T, D] -> [..., D], zero for padding."""
        if self._places_T is not None:
            out_ND = out_TD.new_zeros(math.prod(self._shape[:-1]), self._shape[-1])
            out_TD = out_ND.index_copy(0, self._places_T, out_TD)
        return out_TD.reshape(self._shape)

    def _of_each_token(self, cluster_ids: Tensor) -> Tensor:
        """Of each sequence, or of each token -> [N]."""
        shape = self._shape[:-1]
        if cluster_ids.shape not in (shape[:-1], shape):
            raise ValueError(
                f"cluster_ids must have the sequences' shape, {list(shape[:-1])}, or the tokens', {list(shape)}, got "
                f"{list(cluster_ids.shape)}. Give one cluster for each sequence of x."
            )
        if cluster_ids.shape != shape:
            cluster_ids = cluster_ids.unsqueeze(-1).expand(shape)
        return cluster_ids.reshape(-1)

    def _flat(self, name: str, values: Tensor) -> Tensor:
        """[...] -> [N]."""
        if values.shape != self._shape[:-1]:
            raise ValueError(
                f"{name} must have the tokens' shape, {list(self._shape[:-1])}, got {list(values.shape)}. Give one "
                "value for each token of x."
            )
        return values.reshape(-1)


# torch.compile cannot trace sizes that depend on values.
@torch.compiler.disable
def _places(mask_N: Tensor) -> Tensor:
    return mask_N.nonzero().squeeze(-1)
