"""The policy "swap": uniform replicas, of which pairs change places until loads are even.

L layers, E experts, W ranks, s slots of a rank, S = W * s slots. A bin is a node or a rank: slots that share a load.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy
from swiftmoe_lightning.placement.replication import uniform_replica_counts

# A swap must lower the busiest bin's load by more than this, in mean loads of a slot: less is not worth two transfers.
_WORTH: Final = 1e-3


class SwapPolicy(PlacementPolicy):
    """Expert swap, as HierMoE does it (Lin et al., arXiv 2508.09591): nothing is replicated by popularity.

    HierMoE swaps, each step, the two experts whose swap makes the predicted time of the token exchange shortest; that
    time is a sum over the levels of the network of latency + bytes of the level's busiest link / bandwidth. The same
    here, slowest level first: experts are swapped between nodes until the busiest node cannot get lighter, then
    between the ranks of each node, which leaves the nodes' loads as they are. Other than there

    - a step makes all swaps that help, from the uniform placement on, for moving an expert costs nothing here;
    - where there are more slots than experts, each expert has equally many replicas, which share its load evenly;
    - links are judged by assignments: which tokens have several experts on one node is not known to a forecast.

    Args:
        world_size: W.
        slots_per_rank: s.
        ranks_per_node: neighbours on a node.
    """

    has_uniform_fallback = True

    def __init__(self, world_size: int, slots_per_rank: int, ranks_per_node: int = 1) -> None:
        super().__init__(world_size, slots_per_rank)
        self._ranks_per_node = ranks_per_node

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        num_experts = forecast.popularity_LE.shape[1]
        counts_E = uniform_replica_counts(num_experts, self.num_slots)
        loads_LE, _ = forecast.loads(self.num_slots, 0.0)
        return self.placements_of([self._table(load_E / counts_E, counts_E) for load_E in loads_LE], num_experts)

    def _table(self, load_E: np.ndarray, counts_E: np.ndarray) -> np.ndarray:
        """[S] int64, the expert in every slot.

        Args:
            load_E: [E] float, the load of one replica of each expert.
            counts_E: [E] int64, its replicas.
        """
        table_S = np.repeat(np.arange(len(load_E)), counts_E)
        slots_per_node = self.slots_per_rank * self._ranks_per_node
        table_S = swap_until_even(table_S, load_E, slots_per_node)
        nodes = [table_S[first : first + slots_per_node] for first in range(0, len(table_S), slots_per_node)]
        return np.concatenate([swap_until_even(node, load_E, self.slots_per_rank) for node in nodes])


def swap_until_even(table_S: np.ndarray, load_E: np.ndarray, slots_per_bin: int) -> np.ndarray:
    """Swap slots of the busiest bin with slots of others until no swap makes it lighter: [S] int64.

    Each swap is the best there is for the two bins, by the larger of their loads a slot afterwards:

        loads        e0 8   e1 6   e2 1   e3 2   e4 4   e5 3
        bins         | e0 e1 : 14 | e2 e3 : 3 | e4 e5 : 7 |
        e0 and e3    | e3 e1 : 8  | e2 e0 : 9 | e4 e5 : 7 |     and no swap takes load from 9 without making another 9

    Args:
        table_S: [S] int64, the expert in every slot.
        load_E: [E] float, the load of one slot of each expert; their mean over all slots of the layer is 1.
        slots_per_bin: neighbouring slots; the last bin may have fewer.
    """
    table_S = table_S.copy()
    bin_S = np.arange(len(table_S)) // slots_per_bin
    sizes = np.bincount(bin_S)
    if len(sizes) == 1:
        return table_S
    for _ in range(len(table_S)):
        load_S = load_E[table_S]
        load = np.bincount(bin_S, load_S)
        busiest = int((load / sizes).argmax())
        own = np.flatnonzero(bin_S == busiest)
        # [slots of the busiest bin, S]: what the bin gives away, and the worse of the two bins after that.
        given = load_S[own, None] - load_S
        after = np.maximum((load[busiest] - given) / sizes[busiest], (load[bin_S] + given) / sizes[bin_S])
        after[:, own] = np.inf
        mine, other = divmod(int(after.argmin()), len(table_S))
        if after[mine, other] > load[busiest] / sizes[busiest] - _WORTH:
            break
        table_S[[own[mine], other]] = table_S[[other, own[mine]]]
    return table_S
