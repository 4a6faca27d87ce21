"""Base of policies that keep placements between calls. L layers, E experts, W ranks, s slots of a rank."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.config import check_whole
from swiftmoe_lightning.placement import Forecast, Placement, PlacementPolicy
from swiftmoe_lightning.placement.replication import check_slots


class RevisingPolicy(PlacementPolicy):
    """Keeps each layer's slots from call to call, and revises them at every `interval`-th call.

    The result depends on all calls so far: the same history gives the same placements. An instance serves one set of
    layers. The first interval - 1 calls return the initial placements.

    Args:
        world_size: W.
        slots_per_rank: s.
        interval: calls between two revisions.

    Raises:
        ValueError: for an interval below 1, or when the layers or their experts change between calls.
    """

    def __init__(self, world_size: int, slots_per_rank: int, interval: int) -> None:
        super().__init__(world_size, slots_per_rank)
        check_whole(interval=interval)
        self.interval = interval
        self._num_calls = 0
        self._shape: tuple[int, ...] = ()
        self._tables: list[np.ndarray] = []

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        """One `Placement` a layer; only every `interval`-th call looks at the popularity."""
        popularity_LE = forecast.popularity_LE
        num_layers, num_experts = popularity_LE.shape
        if not self._shape:
            check_slots(num_experts, self.num_slots)
            self._shape = popularity_LE.shape
            self._tables = [self.first_table(num_experts)] * num_layers
        if popularity_LE.shape != self._shape:
            raise ValueError(
                f"{type(self).__name__} remembers {self._shape[0]} layers of {self._shape[1]} experts, got "
                f"popularity of {num_layers} layers of {num_experts}. Make a policy for each set of layers."
            )
        self._num_calls += 1
        if self._num_calls % self.interval == 0:
            rows = zip(self._tables, popularity_LE.astype(np.float64), strict=True)
            self._tables = [self.revised(table_Ws, popularity_E) for table_Ws, popularity_E in rows]
        return self.placements_of([table_Ws.reshape(-1) for table_Ws in self._tables], num_experts)

    @abstractmethod
    def first_table(self, num_experts: int) -> np.ndarray:
        """[W, s] int64: the expert of every slot before the first call.

        Args:
            num_experts: E.
        """

    @abstractmethod
    def revised(self, table_Ws: np.ndarray, popularity_E: np.ndarray) -> np.ndarray:
        """[W, s] int64: one layer's slots after `table_Ws`, which stays as it is.

        Args:
            table_Ws: [W, s] int64, the expert in each slot.
            popularity_E: [E] float, assignments.
        """
