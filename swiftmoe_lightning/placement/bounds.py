"""Lower bounds of what one layer loses in a step (dropped assignments or imbalance), and how much each cause adds.

W ranks, E experts, S slots, P (rank, expert) pairs.

Five bounds, each of which leaves more free than the one before, so that none is above its predecessor. Each is the
least loss that is possible with:

    split         the best split of these tokens under this placement
    placement     the best placement with these numbers of replicas
    prediction    the best numbers of replicas, known in advance (an oracle's)
    floor         the same, but cold experts may have no replica at all
    rounding      the same, and numbers of replicas need not be whole

The difference between a bound and its predecessor (for the first, what was achieved) is what was lost to that cause.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from swiftmoe_lightning.placement.load import ExpertLoad
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.replication import minmax_replica_counts
from swiftmoe_lightning.placement.shares import scaling_weights
from swiftmoe_lightning.placement.token_split import Capacity

CAUSES: Final = ("split", "placement", "prediction", "floor", "rounding")


@dataclass(frozen=True)
class Bounds:
    """How far one layer's step was from the best possible.

    Attributes:
        achieved: what was lost: with a capacity the share of assignments dropped, without one max / mean load of a
            rank.
        by_cause: cause -> lower bound of the loss without that cause and those before it, in the order of `CAUSES`.
            "split" and "floor" may be a little below what can be reached.
    """

    achieved: float
    by_cause: dict[str, float]

    @property
    def losses(self) -> dict[str, float]:
        """Cause -> what was lost to it, 0 or more. Together with the last bound they add up to `achieved`."""
        values = [self.achieved, *self.by_cause.values()]
        return {cause: max(a - b, 0.0) for cause, a, b in zip(self.by_cause, values, values[1:], strict=False)}


def find_bounds(load: ExpertLoad, capacity: Capacity | None) -> Bounds:
    """The bounds of one step's load: of its drops with a capacity, of its imbalance without.

    Args:
        load: the layer's.
        capacity: None is dropless.
    """
    if capacity is None:
        return imbalance_bounds(load.popularity_E, load.placement, load.wanted_W)
    return drop_bounds(load.popularity_E, load.placement, load.num_dropped_tokens, load.budget, capacity.per)


def imbalance_bounds(popularity_E: np.ndarray, placement: Placement, wanted_W: np.ndarray) -> Bounds:
    """The bounds of a step that dropped nothing, in max / mean load of a rank.

    Args:
        popularity_E: [E] int64 assignments.
        placement: where the experts were.
        wanted_W: [W] int64, the assignments that went to each rank.
    """
    mean = popularity_E.sum() / placement.world_size
    if mean == 0:
        return _chain(1.0, [1.0] * len(CAUSES))
    confined_W = _confined(popularity_E, placement)
    counts_E = np.minimum(placement.replica_counts_E, placement.world_size)
    bounds = [
        max(confined_W / np.arange(1, len(confined_W) + 1)),
        max(popularity_E / counts_E),
        _least_share(popularity_E, placement),
        _least_share(popularity_E[popularity_E > 0], placement),
        mean,
    ]
    return _chain(float(wanted_W.max() / mean), [float(bound / mean) for bound in bounds])


def drop_bounds(
    popularity_E: np.ndarray, placement: Placement, num_dropped_tokens: int, budget: int, per: str
) -> Bounds:
    """The bounds of a step with a capacity, in shares of all assignments.

    Args:
        popularity_E: [E] int64 assignments.
        placement: where the experts were.
        num_dropped_tokens: assignments over budget, all ranks.
        budget: assignments that a rank (per="rank") or a slot (per="slot") computes at the most.
        per: what has a budget, "rank" or "slot".
    """
    total = int(popularity_E.sum())
    if total == 0:
        return _chain(0.0, [0.0] * len(CAUSES))
    num_slots, counts_E = placement.slot_to_expert_S.size, placement.replica_counts_E
    if per == "rank":
        confined_W = _confined(popularity_E, placement)
        least = max(confined_W - budget * np.arange(1, len(confined_W) + 1))
        counts_E, room = np.minimum(counts_E, placement.world_size), budget * placement.world_size
        most = placement.world_size
    else:
        # An expert is served up to the sum of its slots' budgets, on whichever ranks they are.
        least = np.maximum(popularity_E - counts_E * budget, 0).sum()
        room, most = budget * num_slots, num_slots
    bounds = [
        least,
        np.maximum(popularity_E - counts_E * budget, 0).sum(),
        _least_over_budget(popularity_E, budget, num_slots, least_replicas=1, most_replicas=most),
        _least_over_budget(popularity_E, budget, num_slots, least_replicas=0, most_replicas=most),
        total - room,
    ]
    return _chain(num_dropped_tokens / total, [max(float(bound), 0.0) / total for bound in bounds])


def _chain(achieved: float, bounds: list[float]) -> Bounds:
    """`Bounds` of these five, each raised to the largest one after it: what is impossible with more freedom is
    impossible with less."""
    raised = np.maximum.accumulate(bounds[::-1])[::-1]
    return Bounds(achieved, dict(zip(CAUSES, raised.tolist(), strict=True)))


def _confined(popularity_E: np.ndarray, placement: Placement) -> np.ndarray:
    """[W] int64: for k = 1..W, the load of the experts that have replicas on the k busiest ranks and on no others.

    By max-flow, min-cut the best split follows from the set of ranks whose confined load exceeds its budget most. That
    set, or a similar one, is the k busiest ranks for some k, when the loads are as even as they can be. So only these W
    sets are looked at: each gives a valid bound, if not always the tightest.

        ranks, busiest first       rank 2    rank 0    rank 1
        their experts              e0 e1     e0 e2     e2 e3
        at the last rank of each   e1        e0        e2 e3
        confined to the first k    e1        e1+e0     all
    """
    order_W = np.argsort(scaling_weights(popularity_E, placement), kind="stable")
    position_W = np.empty_like(order_W)
    position_W[order_W] = np.arange(len(order_W))
    position_P = position_W[placement.pair_rank_P[placement.by_expert_P]]
    last_E = np.maximum.reduceat(position_P, placement.first_pair_E)
    return np.cumsum(np.bincount(last_E, popularity_E, len(order_W)).astype(np.int64))


def _least_share(load_E: np.ndarray, placement: Placement) -> float:
    """The least possible value of the largest load of a replica, where each of these experts has at least one."""
    world_size, num_slots = placement.world_size, placement.slot_to_expert_S.size
    num_slots = min(num_slots, world_size * len(load_E))
    counts_E = minmax_replica_counts(load_E[None], num_slots, max_replicas=world_size)[0]
    return float(max(load_E / counts_E))


def _least_over_budget(
    popularity_E: np.ndarray, budget: int, num_slots: int, *, least_replicas: int, most_replicas: int
) -> float:
    """The least assignments over budget with `num_slots` replicas, each of which serves `budget`.

    Replicas first go where they serve a whole budget, the most that one can serve; those left over go to the largest
    remainders.
    """
    num_full_E = np.minimum(popularity_E // budget, most_replicas)
    served_E = np.minimum(popularity_E, least_replicas * budget)
    num_full = np.maximum(num_full_E - least_replicas, 0).sum()
    num_left = num_slots - least_replicas * len(popularity_E)
    if num_full >= num_left:
        return float(popularity_E.sum() - served_E.sum() - max(num_left, 0) * budget)
    has_remainder_E = (num_full_E >= least_replicas) & (num_full_E < most_replicas)
    remainder_E = np.where(has_remainder_E, popularity_E - num_full_E * budget, 0)
    served = served_E.sum() + num_full * budget + np.sort(remainder_E)[::-1][: num_left - num_full].sum()
    return float(popularity_E.sum() - served)
