import numpy as np
import pytest

from swiftmoe_lightning import Placement, PlacementPolicy
from swiftmoe_lightning.placement import Forecast, make_policy
from swiftmoe_lightning.placement.policies import check_placements


class TooNarrowPolicy(PlacementPolicy):
    def place(self, forecast):
        popularity_LE = forecast.popularity_LE
        return [Placement(np.arange(self.world_size), 2, self.world_size) for _ in popularity_LE]


def test_a_policy_that_forgets_slots_or_layers_is_told_so():
    policy = make_policy(TooNarrowPolicy, 2, 2)
    placements = policy.place(Forecast.of(np.ones((1, 2), dtype=np.int64)))
    with pytest.raises(ValueError, match=r"must place 2 experts on 2 ranks of 2 slots, got .* 2 ranks of 1 slots"):
        check_placements(policy, placements, 1, 2)
    with pytest.raises(ValueError, match=r"TooNarrowPolicy.place gave 1 placements for 3 layers"):
        check_placements(policy, placements, 3, 2)
