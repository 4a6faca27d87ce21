"""Makes a router choose given experts. T tokens, E experts, K top-k."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ChosenExperts(TorchFunctionMode):
    """While it is active, a top-k over all experts chooses these ones, and gives their live scores.

    All the rest is the router's own code: it computes weights from these scores as it always does, and gradients flow
    as always.

    Args:
        ids_TK: [T, K] int64; rows of -1 are left to the router.
        num_experts: E.

    Attributes:
        ids: what each such top-k chose, [T, K] int64.
    """

    def __init__(self, ids_TK: Tensor, num_experts: int) -> None:
        super().__init__()
        self._ids_TK, self._scores_shape = ids_TK, (len(ids_TK), num_experts)
        self.ids: list[Tensor] = []
        # (masked scores, as they were before), for routers that mask all but the best groups of experts: a recorded
        # expert of another group has its score all the same.
        self._masked: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls instead of each of its functions."""
        if func is torch.ops.swiftmoe.route.default and args[2] == self._ids_TK.shape[1]:
            routed = func(*args[:-1], self._ids_TK)
            self.ids.append(routed[1])
            return routed
        result = func(*args, **(kwargs or {}))
        if func in (torch.masked_fill, Tensor.masked_fill) and args[0].shape == self._scores_shape:
            self._masked.append((result, self._unmasked(args[0])))
        if func not in (torch.topk, Tensor.topk) or args[0].shape != self._scores_shape:
            return result
        if result.indices.shape != self._ids_TK.shape:
            return result
        ids_TK = torch.where(self._ids_TK < 0, result.indices, self._ids_TK)
        self.ids.append(ids_TK)
        return type(result)((self._unmasked(args[0]).gather(-1, ids_TK), ids_TK))

    def _unmasked(self, scores_TE: Tensor) -> Tensor:
        return next((before for masked, before in self._masked if masked is scores_TE), scores_TE)
