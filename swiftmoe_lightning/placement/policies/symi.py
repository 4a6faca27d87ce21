"""The policy "symi", the paper's (SYMI, arXiv 2504.19925). L layers, E experts."""

from __future__ import annotations

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy
from swiftmoe_lightning.placement.replication import symi_replica_counts


class SymiPolicy(PlacementPolicy):
    """Replicas in proportion to popularity, laid out expert by expert (Algorithm 1)."""

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        num_experts = forecast.popularity_LE.shape[1]
        counts_LE = symi_replica_counts(forecast.popularity_LE, self.num_slots)
        return self.placements_of([np.repeat(np.arange(num_experts), c_E) for c_E in counts_LE], num_experts)
