"""What a forward of `Experts` hands on: from its first part to its second, and to its caller.

T tokens, D model dim, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swiftmoe_lightning.ops import SortedAssignments


@dataclass(frozen=True, eq=False)
class ExpertsOutput:
    """What one forward of `Experts` returns.

    Attributes:
        hidden_TD: [T, D], the experts' weighted sum for each token.
        popularity_E: [E] int, assignments of all ranks of the group in this forward; on the layer's device.
        num_data_ranks: ranks with tokens of their own that took part.
        recomputes: whether the forward ran inside backward (activation checkpointing).
    """

    hidden_TD: Tensor
    popularity_E: Tensor
    num_data_ranks: float
    recomputes: bool


class StartedForward(NamedTuple):
    """What `Experts.start` returns, for `Experts.finish`.

    Attributes:
        x_TD: [T, D] in the dtype in which the experts compute; this rank's share, where several have the same tokens.
        expert_ids_TK: [T, K] int.
        weights_TK: [T, K].
        scores_finite: [] bool.
        by_expert: the assignments, sorted.
        gather: what the context's `start_count` returned; None on one device, where nothing is counted.
        num_tokens: before a share was taken.
        out_dtype: of the result.
    """

    x_TD: Tensor
    expert_ids_TK: Tensor
    weights_TK: Tensor
    scores_finite: Tensor
    by_expert: SortedAssignments
    gather: Callable[[], Any] | None
    num_tokens: int
    out_dtype: torch.dtype
