"""FlexMoE's placements. E experts, W ranks, s slots of a rank, S = W * s slots."""

from __future__ import annotations

from typing import Final

import numpy as np

from swiftmoe_lightning.analysis.baselines.revising import RevisingPolicy
from swiftmoe_lightning.placement import Placement
from swiftmoe_lightning.placement.shares import rank_loads

# Loads whose ratio is nearer to 1 count as equal: they differ by rounding.
_SAME: Final = 1 - 1e-9


class FlexMoEPolicy(RevisingPolicy):
    """Re-implementation of FlexMoE (Nie et al., SIGMOD 2023, arXiv 2304.03946): its scheduler and policy maker.

    As SYMI's evaluation runs it (arXiv 2504.19925): every `interval` steps, starting from uniform replicas. While the
    most loaded rank has more than `threshold` times the mean load, a round takes the first of these steps that makes
    the cost fall, and the revision ends when neither does, or after S rounds.

    expand and shrink: the expert with the most load a replica gets a slot of the one with the least that has several.
    migrate: a slot of the most loaded rank changes places with one of another rank.

    FlexMoE's code is not public, so these rules are our own. The cost is the largest load of a rank, as in LAER-MoE's
    re-implementation, without the paper's times for all-to-all and all-reduce, which need profiled links. The slot that
    an expert loses is on the least loaded rank that has it, as in LAER-MoE (on the most loaded one, revisions soon get
    stuck). Where several ranks have the largest load, fewer such ranks cost less. A migration is the best of all swaps,
    judged by load and not by the all-reduce that it shortens. A revision ends after S rounds. `threshold` is 1.1.

    Args:
        world_size: W.
        slots_per_rank: s.
        interval: calls between two revisions; SYMI's evaluation takes 10, 50 and 100.
        threshold: largest load of a rank over the mean load that is left alone.

    Raises:
        ValueError: for a threshold below 1, and as `RevisingPolicy` does.
    """

    def __init__(self, world_size: int, slots_per_rank: int, interval: int = 50, threshold: float = 1.1) -> None:
        super().__init__(world_size, slots_per_rank, interval)
        if not threshold >= 1:
            raise ValueError(f"threshold must be a number of 1 or more (1 is perfect balance), got {threshold!r}.")
        self.threshold = threshold

    def first_table(self, num_experts: int) -> np.ndarray:
        """[W, s] int64: uniform replicas."""
        return Placement.uniform(num_experts, self.world_size, self.slots_per_rank).table_Ws

    def revised(self, table_Ws: np.ndarray, popularity_E: np.ndarray) -> np.ndarray:
        """[W, s] int64: one layer's slots after `table_Ws`, by rounds of expand and shrink, or else migrate.

        Args:
            table_Ws: [W, s] int64, the expert in each slot.
            popularity_E: [E] float, assignments.
        """
        accepted = popularity_E.sum() / self.world_size * self.threshold
        cost = _cost(table_Ws, popularity_E)
        for _ in range(self.num_slots):
            if cost[0] <= accepted:
                break
            for step in (expand_and_shrink, migrate):
                next_Ws = step(table_Ws, popularity_E)
                next_cost = _cost(next_Ws, popularity_E)
                if _is_less(next_cost, cost):
                    break
            else:
                break
            table_Ws, cost = next_Ws, next_cost
        return table_Ws


def _cost(table_Ws: np.ndarray, popularity_E: np.ndarray) -> tuple[float, int]:
    """The largest load of a rank, and how many ranks have it."""
    load_W = rank_loads(popularity_E, table_Ws)
    largest = float(load_W.max())
    return largest, int((load_W >= largest * _SAME).sum())


def _is_less(cost: tuple[float, int], other: tuple[float, int]) -> bool:
    if cost[0] < other[0] * _SAME:
        return True
    return cost[0] <= other[0] and cost[1] < other[1]


def expand_and_shrink(table_Ws: np.ndarray, popularity_E: np.ndarray) -> np.ndarray:
    """Give a slot of the coldest expert that has several to the hottest expert, if there is such an expert.

    Args:
        table_Ws: [W, s] int64, the expert in each slot; it stays as it is.
        popularity_E: [E] float, assignments.

    Returns:
        [W, s] int64.
    """
    counts_E = np.bincount(table_Ws.reshape(-1), minlength=len(popularity_E))
    share_E = popularity_E / counts_E
    hot = share_E.argmax()
    can_shrink_E = (counts_E > 1) & (np.arange(len(counts_E)) != hot)
    if not can_shrink_E.any():
        return table_Ws
    cold = np.where(can_shrink_E, share_E, np.inf).argmin()
    rank = np.where((table_Ws == cold).any(1), share_E[table_Ws].sum(1), np.inf).argmin()
    out_Ws = table_Ws.copy()
    out_Ws[rank, (table_Ws[rank] == cold).argmax()] = hot
    return out_Ws


def migrate(table_Ws: np.ndarray, popularity_E: np.ndarray) -> np.ndarray:
    """Swap a slot of the most loaded rank with one of another rank, such that the larger of the two loads is smallest.

    Args:
        table_Ws: [W, s] int64, the expert in each slot; it stays as it is.
        popularity_E: [E] float, assignments.

    Returns:
        [W, s] int64.
    """
    num_slots = table_Ws.shape[1]
    share_Ws = (popularity_E / np.bincount(table_Ws.reshape(-1), minlength=len(popularity_E)))[table_Ws]
    load_W = share_Ws.sum(1)
    busy = load_W.argmax()
    # [s, S]: the load that each swap moves from the busiest rank to the other one.
    moved_sS = share_Ws[busy][:, None] - share_Ws.reshape(-1)
    larger_sS = np.maximum(load_W[busy] - moved_sS, np.repeat(load_W, num_slots) + moved_sS)
    larger_sS[:, busy * num_slots : (busy + 1) * num_slots] = np.inf
    slot, other = np.unravel_index(larger_sS.argmin(), larger_sS.shape)
    out_Ws = table_Ws.copy()
    out_Ws[busy, slot], out_Ws.reshape(-1)[other] = table_Ws.reshape(-1)[other], table_Ws[busy, slot]
    return out_Ws
