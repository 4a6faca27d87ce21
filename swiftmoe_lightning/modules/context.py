"""Where a layer's experts live, as the layer sees it: everything here (one device), or over the ranks (engine).

W ranks, E experts, s slots of this rank, R rows, D model dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import is_sharded
from swiftmoe_lightning.modules.load import NON_FINITE_SCORES
from swiftmoe_lightning.placement import Placement

if TYPE_CHECKING:
    from swiftmoe_lightning.modules.experts import Experts


class ExpertParallelContext(ABC):
    """What `Experts.forward` asks of its surroundings."""

    rank: int
    split: str
    ranks_per_node: int
    placement: Placement

    @abstractmethod
    def begin_forward(self, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype) -> np.ndarray:
        """[E] int64 of this rank -> [W, E] int64 of all. Afterwards `weights` and `placement` are up to date.

        scores_finite: [] bool, whether the router's scores are. dtype: of the rows to come.
        Raises FloatingPointError, on every rank, if any rank's scores are not finite.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Each tensor as [s, ...]; row i is the i-th of `placement.experts_of(rank)`, rows after that are unused."""

    @abstractmethod
    def exchange_rows(self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Rows to their ranks, differentiable."""

    @abstractmethod
    def on_rewrite(self) -> None:
        """Called when the module has written its parameters anew."""

    @abstractmethod
    def on_backward(self, placement: Placement) -> None:
        """Called whenever backward reaches the layer. placement: that of its forward."""


class SingleDeviceContext(ExpertParallelContext):
    """One device holds every expert: a plain MoE."""

    def __init__(self, experts: Experts) -> None:
        self._experts = experts
        self.rank, self.split, self.ranks_per_node = 0, "uniform", 1
        self.placement = Placement(np.arange(experts.num_experts), experts.num_experts, 1)

    def begin_forward(self, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype) -> np.ndarray:
        numbers = torch.cat([counts_E, scores_finite.view(1)]).cpu().numpy()
        if not numbers[-1]:
            raise FloatingPointError(NON_FINITE_SCORES.format(where="an Experts layer"))
        return numbers[None, :-1]

    def weights(self) -> Mapping[str, Tensor]:
        parameters = self._experts.expert_parameters()
        if any(is_sharded(p) for p in parameters.values()):
            raise RuntimeError(
                "these experts are a copy (deepcopy, AveragedModel) of ones that are spread over the ranks, and hold "
                "this rank's rows alone. Spread the copy, too, on all ranks: SwiftMoEEngine(copy), whose mark_stale() "
                "you call when the copy was written. Or load engine.full_state_dict() into a model built anew."
            )
        return parameters

    def exchange_rows(self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        return rows_RD

    def on_rewrite(self) -> None:
        pass

    def on_backward(self, placement: Placement) -> None:
        pass
