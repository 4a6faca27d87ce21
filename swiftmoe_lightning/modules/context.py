"""The interface through which a layer reaches its experts' weights and the other ranks, and its one-device version.

W ranks, E experts, s slots of this rank, R rows, D model dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import HostCopy, NodeGroups, RankGroup, is_sharded
from swiftmoe_lightning.modules.load import NON_FINITE_SCORES
from swiftmoe_lightning.placement import Placement

if TYPE_CHECKING:
    from swiftmoe_lightning.modules.sharded_forward import ShardedEvaluation


class ExpertParallelContext(ABC):
    """What `Experts.forward` needs to know and do that depends on where the experts live.

    `SingleDeviceContext` has all of them on one device; the engine's `ShardedLayer` spreads them over the ranks.

    Attributes:
        rank: this rank.
        split: the token split.
        ranks_per_node: neighbouring ranks on a node.
        placement: which ranks have which expert.
        tensor_ranks: the ranks that have the same tokens as this one; None where it is alone.
        nodes: the groups in which tokens may travel at two levels; None where they travel at one.
        token_dtype: in which tokens travel to their experts; None is as they are.
        evaluation: for evaluation with a part of every expert on each rank; None evaluates as it trains.
    """

    rank: int
    split: str
    ranks_per_node: int
    placement: Placement
    tensor_ranks: RankGroup | None = None
    nodes: NodeGroups | None = None
    token_dtype: torch.dtype | None = None
    evaluation: ShardedEvaluation | None = None

    @property
    def token_bytes(self) -> Mapping[str, int]:
        """Bytes of tokens, of all layers, that this rank has sent "inside" its node and "between" nodes."""
        return {"inside": 0, "between": 0}

    @abstractmethod
    def start_count(
        self, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype, shape_TK: torch.Size
    ) -> Callable[[], Any]:
        """Begin to gather all ranks' counts.

        Args:
            counts_E: [E] int32, assignments of this rank's tokens to each expert.
            scores_finite: [] bool, whether the router's scores are.
            dtype: of the rows that this forward will exchange.
            shape_TK: this rank's tokens, and K.

        Returns:
            For `begin_forward`.
        """

    @abstractmethod
    def begin_forward(self, gather: Callable[[], Any]) -> np.ndarray:
        """Wait for all ranks' counts: [W, E] int64. Afterwards `weights` and `placement` are up to date.

        Args:
            gather: what `start_count` returned.

        Raises:
            FloatingPointError: on every rank, if any rank's scores are not finite.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, Tensor]:
        """Each tensor as [s, ...]; row i is the i-th of `placement.experts_of(rank)`, rows after that are unused."""

    @abstractmethod
    def exchange_rows(
        self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int], dtype: torch.dtype | None
    ) -> Tensor:
        """Send rows to their ranks; differentiable.

        Args:
            rows_RD: [R, D], ordered by the rank they go to.
            send_splits: [W] how many of them go to each rank.
            receive_splits: [W] how many rows each rank sends to this one.
            dtype: in which they travel; None is as they are.

        Returns:
            As many rows as `receive_splits` sum up to, ordered by the rank they come from.
        """

    @abstractmethod
    def start_exchange(self, send: Tensor, send_splits: list[int], receive_splits: list[int]) -> Callable[[], Tensor]:
        """Begin to send numbers, [R], to their ranks as `exchange_rows` sends rows; without gradients.

        Returns:
            What waits for those that arrive.
        """

    @abstractmethod
    def on_rewrite(self) -> None:
        """Called when the module has overwritten its parameters."""

    @abstractmethod
    def end_forward(self, arrived_RD: Tensor, out_TD: Tensor, placement: Placement) -> None:
        """Called when a forward has computed.

        Args:
            arrived_RD: [R, D], the rows that went through this rank's weights.
            out_TD: [T, D], the layer's result.
            placement: of this forward.
        """


class SingleDeviceContext(ExpertParallelContext):
    """One device holds every expert: a plain MoE.

    Args:
        num_experts: E.
        parameters: gives the layer's parameters, name -> [E, ...], as they are now.
    """

    def __init__(self, num_experts: int, parameters: Callable[[], Mapping[str, Tensor]]) -> None:
        self._parameters = parameters
        self.rank, self.split, self.ranks_per_node = 0, "uniform", 1
        self.placement = Placement(np.arange(num_experts), num_experts, 1)

    def start_count(
        self, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype, shape_TK: torch.Size
    ) -> Callable[[], Any]:
        """Begin to copy the counts to the host.

        Args:
            counts_E: [E] int32, assignments to each expert.
            scores_finite: [] bool, whether the router's scores are.
            dtype: not used.
            shape_TK: not used.
        """
        numbers = torch.cat([counts_E, scores_finite.view(1)])
        return HostCopy(numbers.device, lambda: numbers).wait

    def begin_forward(self, gather: Callable[[], Any]) -> np.ndarray:
        """[1, E] int64 on the host, which waits for the device.

        Args:
            gather: what `start_count` returned.

        Raises:
            FloatingPointError: if the scores are not finite.
        """
        numbers = gather()
        if not numbers[-1]:
            raise FloatingPointError(NON_FINITE_SCORES.format(where="an Experts layer"))
        counts_WE: np.ndarray = numbers[None, :-1].astype(np.int64)
        return counts_WE

    def weights(self) -> Mapping[str, Tensor]:
        """The layer's own parameters.

        Raises:
            RuntimeError: when they are sharded, as in a copy of a layer that is spread over ranks.
        """
        parameters = self._parameters()
        if any(is_sharded(parameter) for parameter in parameters.values()):
            raise RuntimeError(
                "these experts are a copy (deepcopy, AveragedModel) of ones that are spread over the ranks, and hold "
                "this rank's rows alone. Spread the copy, too, on all ranks: SwiftMoEEngine(copy), whose mark_stale() "
                "you call when the copy was written. Or load engine.full_state_dict() into a model built anew. "
                "(FAQ: copied-experts)"
            )
        return parameters

    def exchange_rows(
        self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int], dtype: torch.dtype | None
    ) -> Tensor:
        """`rows_RD` itself: there is no other rank."""
        return rows_RD

    def start_exchange(self, send: Tensor, send_splits: list[int], receive_splits: list[int]) -> Callable[[], Tensor]:
        """Nothing to wait for: `send` itself."""
        return lambda: send

    def on_rewrite(self) -> None:
        """Nothing to do: forward computes with the parameters themselves."""
        pass

    def end_forward(self, arrived_RD: Tensor, out_TD: Tensor, placement: Placement) -> None:
        """Nothing to do: gradients will be in `.grad` of the parameters."""
        pass
