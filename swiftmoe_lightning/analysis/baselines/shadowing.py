"""FasterMoE's placements. E experts, W ranks, s slots of a rank."""

from __future__ import annotations

from typing import Final

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.analysis.baselines.tables import fill_slots, home_ranks
from swiftmoe_lightning.placement import Forecast, Placement, PlacementPolicy
from swiftmoe_lightning.placement.replication import check_slots

# The rates in FasterMoE's code: two matrices of an expert in float32, hidden dim 2 * 2048; a rank's 11.5 TFLOP/s and
# 50 Gbit/s. Seconds for each unit of the model dim, to which all three are proportional.
_HIDDEN_DIM: Final = 4096
_COMPUTE: Final = 2 * 2 * _HIDDEN_DIM / 11.5e12
_TRANSFER: Final = 4 / 6.25e9
_COPY: Final = 2 * 4 * _HIDDEN_DIM / 6.25e9
_COPY_ASSIGNMENTS: Final = _COPY / (3 * _COMPUTE + 4 * _TRANSFER)


class ShadowingPolicy(PlacementPolicy):
    """Re-implementation of FasterMoE's shadow experts (He et al., PPoPP 2022; `shadow_policy.py` of laekov/fastmoe).

    Every expert has a fixed home rank. In each step the k hottest ones are copied to all ranks, for that step. k grows
    as long as the predicted time falls, which is, for the hottest expert that is not copied,

        its assignments * (3 * compute + 4 * transfer) + k * copy

    with the seconds to compute an assignment (once in forward, twice in backward), to send it once (four times a step)
    and to copy an expert's weights. Of the rates, only the number of assignments that take as long as a copy matters.

    FasterMoE copies into separate memory, so these rules are our own. The k shadows and the experts at home must fit
    into every rank's s slots. Spare slots repeat the rank's experts at home, if it has any, or else the shadows; ranks
    with neither (fewer experts than ranks, no shadow) hold replicas of the hottest expert. As in FasterMoE's code, the
    formula has the load of an expert, not of a rank, and the copying of weights, not of their gradients.

    Args:
        world_size: W.
        slots_per_rank: s.
        copy_assignments: copy / (3 * compute + 4 * transfer). The default is for the rates of FasterMoE's code.
    """

    def __init__(self, world_size: int, slots_per_rank: int, copy_assignments: float = _COPY_ASSIGNMENTS) -> None:
        super().__init__(world_size, slots_per_rank)
        self._copy_assignments = copy_assignments

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        """One `Placement` a layer, for the very step that is to be served."""
        popularity_LE = forecast.popularity_LE
        num_experts = popularity_LE.shape[1]
        check_slots(num_experts, self.num_slots)
        return self.placements_of([self._table(popularity_E) for popularity_E in popularity_LE], num_experts)

    def _table(self, popularity_E: np.ndarray) -> np.ndarray:
        """[S] int64: the expert of every slot."""
        order = np.argsort(-popularity_E, kind="stable")
        home_E = home_ranks(len(order), self.world_size)
        shadows = order[: self._num_shadows(popularity_E[order], home_E[order])].tolist()
        at_home_W: list[list[int]] = [[] for _ in range(self.world_size)]
        for expert in np.setdiff1d(np.arange(len(order)), shadows).tolist():
            at_home_W[home_E[expert]].append(expert)
        # A rank repeats its experts at home: more slots of a shadow would draw that expert's load from other ranks.
        slots_W = [
            fill_slots(at_home + shadows, at_home or shadows, self.slots_per_rank)
            or [int(order[0])] * self.slots_per_rank
            for at_home in at_home_W
        ]
        return np.concatenate(slots_W)

    def _num_shadows(self, falling_E: np.ndarray, home_E: np.ndarray) -> int:
        """How many of the hottest experts are worth a copy and fit. Both arrays are by falling popularity."""
        best = float(falling_E[0])
        num_at_home_W = np.bincount(home_E, minlength=self.world_size)
        for k in range(1, len(falling_E)):
            num_at_home_W[home_E[k - 1]] -= 1
            time = float(falling_E[k]) + k * self._copy_assignments
            if time >= best or num_at_home_W.max() + k > self.slots_per_rank:
                return k - 1
            best = time
        return len(falling_E) - 1
