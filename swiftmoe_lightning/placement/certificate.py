"""The least that could have been lost in one layer and step, and what the rest was lost to.

W ranks, E experts, S slots, P hosted (rank, expert) pairs, B token budget of a rank.

Five bounds, each over more freedom than the one before, so that none is above its predecessor:

    split         the best split of these tokens under this placement
    placement     the best placement with these numbers of replicas
    prediction    the best numbers of replicas for these tokens: a clairvoyant's
    floor         the same, but cold experts may have no replica at all
    rounding      the same, and numbers of replicas need not be whole

The gap before each is what was lost to it.
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
class Certificate:
    """How far one layer's step was from the best possible.

    Attributes:
        achieved: what it came to: the share of assignments dropped, or max / mean load of a rank without a capacity.
        bounds: cause -> the least that is possible once that cause is gone, in the order of `CAUSES`. Lower bounds:
            they hold for certain; "split" and "floor" may be a little below what can be reached.
    """

    achieved: float
    bounds: dict[str, float]

    @property
    def losses(self) -> dict[str, float]:
        """Cause -> what was lost to it, 0 or more; with the last bound they add up to `achieved`."""
        values = [self.achieved, *self.bounds.values()]
        return {cause: max(a - b, 0.0) for cause, a, b in zip(self.bounds, values, values[1:], strict=False)}


def certify(load: ExpertLoad, capacity: Capacity | None) -> Certificate:
    """The certificate of one step's load: of its drops where there is a capacity, of its imbalance where not."""
    if capacity is None:
        return certify_imbalance(load.popularity_E, load.placement, load.wanted_W)
    return certify_drops(load.popularity_E, load.placement, load.num_dropped_tokens, load.budget, capacity.per)


def certify_imbalance(popularity_E: np.ndarray, placement: Placement, wanted_W: np.ndarray) -> Certificate:
    """The certificate of a step that dropped nothing, in max / mean load of a rank.

    Args:
        popularity_E: [E] int64 assignments.
        placement: where the experts were.
        wanted_W: [W] int64, the assignments that went to each rank.
    """
    mean = popularity_E.sum() / placement.world_size
    if mean == 0:
        return _chain(1.0, [1.0] * len(CAUSES))
    confined_k = _confined(popularity_E, placement)
    counts_E = np.minimum(placement.replica_counts_E, placement.world_size)
    bounds = [
        max(confined_k / np.arange(1, len(confined_k) + 1)),
        max(popularity_E / counts_E),
        _least_share(popularity_E, placement),
        _least_share(popularity_E[popularity_E > 0], placement),
        mean,
    ]
    return _chain(float(wanted_W.max() / mean), [float(bound / mean) for bound in bounds])


def certify_drops(
    popularity_E: np.ndarray, placement: Placement, num_dropped_tokens: int, budget: int, per: str
) -> Certificate:
    """The certificate of a step with a capacity, in shares of all assignments.

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
        confined_k = _confined(popularity_E, placement)
        least = max(confined_k - budget * np.arange(1, len(confined_k) + 1))
        counts_E, room = np.minimum(counts_E, placement.world_size), budget * placement.world_size
        most = placement.world_size
    else:
        # Wherever its slots are, an expert is served up to the sum of their budgets.
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


def _chain(achieved: float, bounds: list[float]) -> Certificate:
    """What bounds a wider choice bounds a narrower one, too."""
    tight = np.maximum.accumulate(bounds[::-1])[::-1]
    return Certificate(achieved, dict(zip(CAUSES, tight.tolist(), strict=True)))


def _confined(popularity_E: np.ndarray, placement: Placement) -> np.ndarray:
    """[W] int64: for k = 1..W, assignments that have to be computed by some k ranks, chosen to be many.

    By max-flow, min-cut the best split is told by the set of ranks to which most load is confined, over its budget.
    The ranks that remain busiest when the loads are evened out are that set, or near it: sets are tried in that order,
    which gives a bound that holds whatever the order.
    """
    order_W = np.argsort(scaling_weights(popularity_E, placement), kind="stable")
    place_W = np.empty_like(order_W)
    place_W[order_W] = np.arange(len(order_W))
    place_P = place_W[placement.pair_host_P[placement.by_expert_P]]
    last_E = np.maximum.reduceat(place_P, placement.first_pair_E)
    return np.cumsum(np.bincount(last_E, popularity_E, len(order_W)).astype(np.int64))


def _least_share(load_E: np.ndarray, placement: Placement) -> float:
    """The largest load of a replica, as small as numbers of replicas can make it, one of each of these at least."""
    world_size, num_slots = placement.world_size, placement.slot_to_expert_S.size
    num_slots = min(num_slots, world_size * len(load_E))
    counts_E = minmax_replica_counts(load_E[None], num_slots, max_replicas=world_size)[0]
    return float(max(load_E / counts_E))


def _least_over_budget(
    popularity_E: np.ndarray, budget: int, num_slots: int, *, least_replicas: int, most_replicas: int
) -> float:
    """The least assignments over budget with `num_slots` replicas, each of which serves `budget`.

    Whole budgets first, for each serves as much as a replica can; then the largest remainders.
    """
    whole_E = np.minimum(popularity_E // budget, most_replicas)
    served_E = np.minimum(popularity_E, least_replicas * budget)
    full = np.maximum(whole_E - least_replicas, 0).sum()
    left = num_slots - least_replicas * len(popularity_E)
    if full >= left:
        return float(popularity_E.sum() - served_E.sum() - max(left, 0) * budget)
    has_rest_E = (whole_E >= least_replicas) & (whole_E < most_replicas)
    rest_E = np.where(has_rest_E, popularity_E - whole_E * budget, 0)
    served = served_E.sum() + full * budget + np.sort(rest_E)[::-1][: left - full].sum()
    return float(popularity_E.sum() - served)
