"""The policy "static": uniform replicas that never move. L layers, E experts."""

from __future__ import annotations

from typing_extensions import override

from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy


class StaticPolicy(PlacementPolicy):
    """Uniform replicas, laid out expert by expert, whatever the popularity."""

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        num_layers, num_experts = forecast.popularity_LE.shape
        return [Placement.uniform(num_experts, self.world_size, self.slots_per_rank)] * num_layers
