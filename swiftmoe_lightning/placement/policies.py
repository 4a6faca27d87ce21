"""Popularity -> placements, for all layers at once: the paper's rule, and ours.

L layers, E experts, W ranks, s slots of a rank, S = W * s slots, P hosted (rank, expert) pairs.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.config import PLACEMENTS, check_choice
from swiftmoe_lightning.placement.balanced import BalancedPolicy
from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policy import PlacementPolicy
from swiftmoe_lightning.placement.replication import (
    minmax_replica_counts,
    symi_replica_counts,
)

# See `Forecast.loads`: how much of their slots hot experts leave to cold ones that may become hot.
_COLD: Final = 0.03


class StaticPolicy(PlacementPolicy):
    """The same number of replicas for every expert, laid out expert by expert, for ever."""

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        num_layers, num_experts = forecast.popularity_LE.shape
        return [Placement.uniform(num_experts, self.world_size, self.slots_per_rank)] * num_layers


class SymiPolicy(PlacementPolicy):
    """The paper's: replicas in proportion to popularity, laid out expert by expert (Algorithm 1)."""

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        num_experts = forecast.popularity_LE.shape[1]
        counts_LE = symi_replica_counts(forecast.popularity_LE, self.num_slots)
        return self.placements_of([np.repeat(np.arange(num_experts), c_E) for c_E in counts_LE], num_experts)


class PackedPolicy(PlacementPolicy):
    """Replicas that even out their loads, at most one of an expert on a rank, hot packed with cold.

    Loads are what the experts' may come to, so that where popularity jumps, cold experts have spare replicas, too.
    Replicas are dealt in s rounds of W, by falling load: each round gives its heaviest replica to the rank that
    carries least so far. A budget pooled over a rank's slots then holds what no slot's own budget could.
    """

    has_uniform_fallback = True

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        _, upper_LE = forecast.loads(self.world_size, _COLD)
        return self.placements_of(self._slot_tables(upper_LE), upper_LE.shape[1])

    def _slot_tables(self, upper_LE: np.ndarray) -> np.ndarray:
        num_layers, num_experts = upper_LE.shape
        if self.slots_per_rank >= num_experts:
            # Every rank can host every expert; the slots left over repeat them.
            one_rank = np.arange(self.slots_per_rank) % num_experts
            return np.tile(one_rank, (num_layers, self.world_size))
        counts_LE = minmax_replica_counts(upper_LE, self.num_slots, max_replicas=self.world_size)
        share_LE = upper_LE / counts_LE
        order_LE = np.argsort(-share_LE, axis=1, kind="stable")
        dealt_LS = np.stack(
            [np.repeat(order, counts[order]) for order, counts in zip(order_LE, counts_LE, strict=True)]
        )
        return self._deal(dealt_LS, share_LE)

    def _deal(self, dealt_LS: np.ndarray, share_LE: np.ndarray) -> np.ndarray:
        """Replicas by falling load -> slots: round i fills the i-th slot of every rank, lightest rank first."""
        num_layers, world_size = len(dealt_LS), self.world_size
        rows_L1 = np.arange(num_layers)[:, None]
        load_LW = np.zeros((num_layers, world_size))
        table_LWs = np.empty((num_layers, world_size, self.slots_per_rank), dtype=np.int64)
        previous_LW = np.full((num_layers, world_size), -1)
        for slot, expert_LW in enumerate(np.split(dealt_LS, self.slots_per_rank, axis=1)):
            # An expert whose replicas straddle two rounds must not meet a rank that it was dealt in the round before.
            straddler_L1 = expert_LW[:, :1]
            num_straddling_L1 = (expert_LW == straddler_L1).sum(1, keepdims=True)
            has_straddler_LW = previous_LW == straddler_L1
            order_LW = np.lexsort((load_LW, has_straddler_LW))
            served_LW = np.zeros((num_layers, world_size), dtype=bool)
            served_LW[rows_L1, order_LW] = np.arange(world_size) < num_straddling_L1
            order_LW = np.lexsort((load_LW, ~served_LW))
            previous_LW = np.empty_like(expert_LW)
            previous_LW[rows_L1, order_LW] = expert_LW
            load_LW += share_LE[rows_L1, previous_LW]
            table_LWs[:, :, slot] = previous_LW
        return table_LWs.reshape(num_layers, -1)


_POLICIES: Final[dict[str, type[PlacementPolicy]]] = {
    "static": StaticPolicy,
    "symi": SymiPolicy,
    "packed": PackedPolicy,
}


def make_policy(
    placement: str | type[PlacementPolicy], world_size: int, slots_per_rank: int, ranks_per_node: int = 1
) -> PlacementPolicy:
    """The policy of that name, or of that class.

    Args:
        placement: one of `PLACEMENTS`, or a policy class.
        world_size: W.
        slots_per_rank: s.
        ranks_per_node: neighbours on a node.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything that is neither a name nor a policy class.
    """
    if isinstance(placement, str):
        check_choice("placement", placement, PLACEMENTS)
        if placement == "balanced":
            return BalancedPolicy(world_size, slots_per_rank, ranks_per_node)
        placement = _POLICIES[placement]
    if not (isinstance(placement, type) and issubclass(placement, PlacementPolicy)):
        raise TypeError(f"placement must be a name or a subclass of PlacementPolicy, got {placement!r}.")
    return placement(world_size, slots_per_rank)
