"""The policy "packed": a replica in every slot, hot experts on one rank with cold ones.

L layers, E experts, W ranks, s slots of a rank, S = W * s slots.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy
from swiftmoe_lightning.placement.replication import minmax_replica_counts

# See `Forecast.loads`. The larger it is, the more slots go to cold experts, which may become hot.
_COLD: Final = 0.03


class PackedPolicy(PlacementPolicy):
    """Replicas that even out their loads, at most one of an expert on a rank, hot packed with cold.

    Loads are the forecast's upper limits, so that cold experts, too, have spare replicas where popularity jumps.
    Replicas are dealt in s rounds of W, by falling load: each round gives its heaviest replica to the rank with the
    least load so far. A budget pooled over a rank's slots then fits loads that a budget for each slot would not.
    """

    has_uniform_fallback = True

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        _, upper_LE = forecast.loads(self.world_size, _COLD)
        return self.placements_of(self._slot_tables(upper_LE), upper_LE.shape[1])

    def _slot_tables(self, upper_LE: np.ndarray) -> np.ndarray:
        num_layers, num_experts = upper_LE.shape
        if self.slots_per_rank >= num_experts:
            # Every rank has every expert; the slots left over repeat them.
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
        """Replicas by falling load -> slots: round i fills the i-th slot of every rank, lightest rank first.

        dealt_LS            e0 e0 e1 | e1 e2 e3      W = 3 ranks, so rounds of 3
        round 0, by rank    e0 e0 e1                 Rank 2 is the lightest now, but has e1 already: the other
        round 1, by rank    e1 e3 e2                 replica of e1 goes to the lighter one of ranks 0 and 1.
        """
        num_layers, world_size = len(dealt_LS), self.world_size
        layer_L1 = np.arange(num_layers)[:, None]
        load_LW = np.zeros((num_layers, world_size))
        table_LWs = np.empty((num_layers, world_size, self.slots_per_rank), dtype=np.int64)
        previous_LW = np.full((num_layers, world_size), -1)
        for slot, expert_LW in enumerate(np.split(dealt_LS, self.slots_per_rank, axis=1)):
            # The first expert of a round may have had replicas in the round before, too: those that are left of it go
            # to the lightest ranks that did not get it then.
            first_L1 = expert_LW[:, :1]
            num_first_L1 = (expert_LW == first_L1).sum(1, keepdims=True)
            has_first_LW = previous_LW == first_L1
            order_LW = np.lexsort((load_LW, has_first_LW))
            gets_first_LW = np.zeros((num_layers, world_size), dtype=bool)
            gets_first_LW[layer_L1, order_LW] = np.arange(world_size) < num_first_L1
            order_LW = np.lexsort((load_LW, ~gets_first_LW))
            previous_LW = np.empty_like(expert_LW)
            previous_LW[layer_L1, order_LW] = expert_LW
            load_LW += share_LE[layer_L1, previous_LW]
            table_LWs[:, :, slot] = previous_LW
        return table_LWs.reshape(num_layers, -1)
