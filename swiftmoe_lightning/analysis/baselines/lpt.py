"""SmartMoE's placements. E experts, W ranks, s slots of a rank."""

from __future__ import annotations

from typing import Final

import numpy as np

from swiftmoe_lightning.analysis.baselines.revising import RevisingPolicy
from swiftmoe_lightning.analysis.baselines.tables import fill_slots, home_ranks
from swiftmoe_lightning.placement.shares import rank_loads

# A largest load that falls by less counts as equal: it differs by rounding.
_FALLS: Final = 1 - 1e-9


class LPTPolicy(RevisingPolicy):
    """Re-implementation of SmartMoE's expert placement (Zhai et al., USENIX ATC 2023), its light-weight online part.

    Experts move, but are not replicated. By falling popularity, each goes to the least loaded rank that has a free
    slot (longest processing time first), on ties to the rank it is on; the result is adopted only if the largest load
    of a rank falls. At first, neighbouring experts share a rank.

    SmartMoE has as many slots as experts, so these rules are our own. With more slots, a rank may hold up to s experts,
    and spare slots repeat experts of the same rank, the hottest first, which adds no pair. With fewer experts than
    ranks, the ranks left over hold replicas of the hottest expert (at first: of the nearest one below), since a
    `Placement` leaves no slot empty; these replicas do share the load.

    Args:
        world_size: W.
        slots_per_rank: s.
        interval: calls between two revisions; SmartMoE's own experiments take 10 and more.
    """

    def __init__(self, world_size: int, slots_per_rank: int, interval: int = 1) -> None:
        super().__init__(world_size, slots_per_rank, interval)

    def first_table(self, num_experts: int) -> np.ndarray:
        """[W, s] int64: neighbouring experts share a rank."""
        home_E = home_ranks(num_experts, self.world_size)
        experts_W = [np.flatnonzero(home_E == rank).tolist() for rank in range(self.world_size)]
        nearest_W = np.searchsorted(home_E, np.arange(self.world_size), side="right") - 1
        return self._table([experts or [expert] for experts, expert in zip(experts_W, nearest_W.tolist(), strict=True)])

    def revised(self, table_Ws: np.ndarray, popularity_E: np.ndarray) -> np.ndarray:
        """[W, s] int64: one layer's slots: assigned anew if the largest load of a rank falls, else `table_Ws`.

        Args:
            table_Ws: [W, s] int64, the expert in each slot.
            popularity_E: [E] float, assignments.
        """
        hottest = int(popularity_E.argmax())
        next_Ws = self._table([experts or [hottest] for experts in self._deal(table_Ws, popularity_E)])
        cost, next_cost = (rank_loads(popularity_E, t_Ws).max() for t_Ws in (table_Ws, next_Ws))
        return next_Ws if next_cost < cost * _FALLS else table_Ws

    def _table(self, experts_W: list[list[int]]) -> np.ndarray:
        return np.array([fill_slots(experts, experts, self.slots_per_rank) for experts in experts_W])

    def _deal(self, table_Ws: np.ndarray, popularity_E: np.ndarray) -> list[list[int]]:
        """Experts of every rank; with at least W experts, every rank gets one, since experts stay only on ties."""
        # The first rank of each expert; an expert has further ones only where there are more ranks than experts.
        current_E = np.unique(table_Ws, return_index=True)[1] // self.slots_per_rank
        load_W = np.zeros(self.world_size)
        experts_W: list[list[int]] = [[] for _ in range(self.world_size)]
        for expert in np.argsort(-popularity_E, kind="stable").tolist():
            rank = int(current_E[expert])
            if load_W[rank] > load_W.min():
                rank = int(load_W.argmin())
            experts_W[rank].append(expert)
            load_W[rank] += popularity_E[expert]
            # So that no more experts go to a full rank.
            if len(experts_W[rank]) == self.slots_per_rank:
                load_W[rank] = np.inf
        return experts_W
