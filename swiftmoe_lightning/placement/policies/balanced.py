"""The policy "balanced": few (rank, expert) pairs, a chain that carries the load and spare pairs for its movement.

L layers, E experts, W ranks, s slots of a rank, P (rank, expert) pairs, X spare pairs, H experts that the chain cuts.
Loads are in budgets: 1 is the mean load of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policies.policy import PlacementPolicy
from swiftmoe_lightning.placement.replication import check_slots

# See `Forecast.loads`. Ten times the value in "packed", which fills all slots: here a cold expert, which may become
# hot, has a spare pair only if its upper limit asks for one.
_COLD: Final = 0.3
# Experts with less load live on one rank; those with more lie on the line that the chain cuts.
_SINGLE_RANK_LOAD: Final = 0.5
# Loads as small as this are rounding.
_TINY: Final = 1e-6


class BalancedPolicy(PlacementPolicy):
    """As few pairs as carry the expected load evenly, and spare pairs for its movement, up to s pairs a rank.

    Both weight phases move bytes in proportion to P, so a replica in every slot is not free. A chain of at most
    E + W - 1 pairs carries the expected loads exactly; expert e then gets spare pairs, until the upper limit of its
    load, load + 3 * sqrt(spread * (load + 0.3)), is no more than a budget for each of its ranks.

    Args:
        world_size: W.
        slots_per_rank: s.
        ranks_per_node: neighbours on the chain are put on different nodes, so that an expert's ranks are near all
            tokens.
    """

    has_uniform_fallback = True

    def __init__(self, world_size: int, slots_per_rank: int, ranks_per_node: int = 1) -> None:
        super().__init__(world_size, slots_per_rank)
        # Position on the chain -> rank: first the first rank of every node, then the second, ...
        ranks = np.arange(world_size)
        self._rank_of_position = np.lexsort((ranks // ranks_per_node, ranks % ranks_per_node))

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        num_experts = forecast.popularity_LE.shape[1]
        check_slots(num_experts, self.num_slots)
        layers = zip(*forecast.loads(self.world_size, _COLD), strict=True)
        return self.placements_of([self._table(load_E, upper_E) for load_E, upper_E in layers], num_experts)

    def _table(self, load_E: np.ndarray, upper_E: np.ndarray) -> np.ndarray:
        """[S] int64, the expert in every slot. Slots that are not needed repeat an expert of their rank."""
        chain = chain_pairs(load_E, self.world_size, self.slots_per_rank)
        rank_X, expert_X = spare_pairs(chain, upper_E, self.world_size, self.slots_per_rank)
        rank_P, expert_P = np.r_[chain.rank_P, rank_X], np.r_[chain.expert_P, expert_X]
        order_P = np.argsort(rank_P, kind="stable")
        num_pairs_W = np.bincount(rank_P, minlength=self.world_size)
        first_W = np.cumsum(num_pairs_W) - num_pairs_W
        slot_s = np.arange(self.slots_per_rank)
        table_Ws = expert_P[order_P][first_W[:, None] + slot_s % num_pairs_W[:, None]]
        return table_Ws[np.argsort(self._rank_of_position)].reshape(-1)


@dataclass(frozen=True, eq=False)
class PairList:
    """The (rank, expert) pairs of one layer, each once.

    Attributes:
        rank_P: [P] int64, the rank of each pair.
        expert_P: [P] int64, its expert.
        load_P: [P] float, budgets, the part of the expert's load that goes to the rank.
    """

    rank_P: np.ndarray
    expert_P: np.ndarray
    load_P: np.ndarray


def chain_pairs(load_E: np.ndarray, world_size: int, slots_per_rank: int) -> PairList:
    """Pairs that carry exactly `load_E`, at most E + W - 1 of them (McNaughton's wrap-around rule).

    Experts of less than half a budget live on one rank each, dealt by falling load to the lightest. The others lie
    on a line, and the ranks, each with what room it has left, cut it: neighbours share the expert at their cut, so
    that where the forecast is off, load can be passed along the chain.

    Args:
        load_E: [E] float, budgets, adding up to W.
        world_size: W.
        slots_per_rank: s, the most experts of a rank.
    """
    order_E = np.argsort(-load_E, kind="stable")
    is_single_E = load_E < _SINGLE_RANK_LOAD
    single, line = order_E[is_single_E[order_E]], order_E[~is_single_E[order_E]]
    single_rank, taken_W = _deal_single_ranks(load_E[single], world_size)
    line_rank, line_expert, line_load = _cut_line(load_E[line], np.maximum(1 - taken_W, 0))
    chain = PairList(np.r_[single_rank, line_rank], np.r_[single, line[line_expert]], np.r_[load_E[single], line_load])
    return _fit_slots(chain, world_size, slots_per_rank, len(load_E))


def _deal_single_ranks(falling_load: np.ndarray, world_size: int) -> tuple[np.ndarray, np.ndarray]:
    """One rank for each expert, in rounds of W, the heaviest of a round to the lightest rank; and [W] loads so far."""
    taken_W = np.zeros(world_size)
    rank = np.empty(len(falling_load), dtype=np.int64)
    for start in range(0, len(falling_load), world_size):
        batch = falling_load[start : start + world_size]
        lightest = np.argsort(taken_W, kind="stable")[: len(batch)]
        taken_W[lightest] += batch
        rank[start : start + world_size] = lightest
    return rank, taken_W


def _cut_line(load_H: np.ndarray, room_W: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay the experts' loads on a line, one after the other, and the ranks' rooms on the same line: overlaps are pairs.

        experts, by their loads   |---- e0 1.6 ---|--- e1 1.4 --|- e2 1.0 |
        ranks, of room 1 each     |--- r0 --|--- r1 --|--- r2 --|--- r3 --|
        loads of the overlaps         1.0     0.6  0.4    1.0       1.0
        pairs                     (r0,e0) (r1,e0) (r1,e1) (r2,e1) (r3,e2)

    Args:
        load_H: [H] float, loads of the experts on the line.
        room_W: [W] float, what each rank can still take; they are scaled to fit the line.

    Returns:
        (rank, place on the line of the expert, load) of each pair.
    """
    num_ranks = len(room_W)
    room_W = room_W * (load_H.sum() / max(room_W.sum(), _TINY))
    stop_W, stop_H = np.cumsum(room_W), np.cumsum(load_H)
    start_W, start_H = stop_W - room_W, stop_H - load_H
    first_rank_H = np.minimum(np.searchsorted(stop_W, start_H + _TINY, side="right"), num_ranks - 1)
    last_rank_H = np.minimum(np.searchsorted(stop_W, stop_H - _TINY, side="left"), num_ranks - 1)
    num_ranks_H = np.maximum(last_rank_H - first_rank_H, 0) + 1
    expert_P = np.repeat(np.arange(len(load_H)), num_ranks_H)
    rank_P = first_rank_H[expert_P] + _index_in_group(num_ranks_H)
    load_P = np.minimum(stop_H[expert_P], stop_W[rank_P]) - np.maximum(start_H[expert_P], start_W[rank_P])
    # An expert keeps its only rank, however small the overlap.
    is_pair_P = (load_P > _TINY) | (num_ranks_H[expert_P] == 1)
    return rank_P[is_pair_P], expert_P[is_pair_P], load_P[is_pair_P]


def _index_in_group(sizes: np.ndarray) -> np.ndarray:
    """Groups of these sizes one after the other -> the index of each member in its group: [2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)


def _fit_slots(pairs: PairList, world_size: int, slots_per_rank: int, num_experts: int) -> PairList:
    """At most s pairs a rank: where there are more, those with the least load go. An expert that has no pair left gets
    one on the lightest rank with a free slot."""
    num_pairs_W = np.bincount(pairs.rank_P, minlength=world_size)
    if num_pairs_W.max() <= slots_per_rank:
        return pairs
    order_P = np.lexsort((-pairs.load_P, pairs.rank_P))
    heaviest = np.sort(order_P[_index_in_group(num_pairs_W) < slots_per_rank])
    rank_P, expert_P, load_P = pairs.rank_P[heaviest], pairs.expert_P[heaviest], pairs.load_P[heaviest]
    unplaced = np.setdiff1d(pairs.expert_P, expert_P)
    load_E = np.bincount(pairs.expert_P, pairs.load_P, num_experts)
    for expert in unplaced[np.argsort(-load_E[unplaced], kind="stable")]:
        num_pairs_W = np.bincount(rank_P, minlength=world_size)
        load_W = np.bincount(rank_P, load_P, world_size)
        rank = int(np.where(num_pairs_W < slots_per_rank, load_W, np.inf).argmin())
        if num_pairs_W[rank] == slots_per_rank:
            # Every rank is full: of the experts that have several pairs, the pair with the least load makes room.
            has_several_P = np.bincount(expert_P, minlength=num_experts)[expert_P] > 1
            removed = int(np.where(has_several_P, load_P, np.inf).argmin())
            rank = int(rank_P[removed])
            rank_P, expert_P, load_P = (np.delete(values, removed) for values in (rank_P, expert_P, load_P))
        rank_P, expert_P, load_P = (
            np.append(rank_P, rank),
            np.append(expert_P, expert),
            np.append(load_P, load_E[expert]),
        )
    return PairList(rank_P, expert_P, load_P)


def spare_pairs(
    pairs: PairList, upper_E: np.ndarray, world_size: int, slots_per_rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Further pairs, until no expert's upper limit is above one budget for each of its ranks, or all slots are used.

    An expert's spare pairs are spread evenly round the ring of ranks, away from the pairs it has, so that they draw on
    distant parts of the chain.

        ring of ranks         0    1    2    3    4    5    6    7
        middle of e's pairs        *
        targets of 3 spares                  *         *         *    1 + 8 * (1/4, 2/4, 3/4)
        The spares of all experts, by target, go to the free slots, by rank.

    Args:
        pairs: those that are placed already.
        upper_E: [E] float, budgets, the upper limit of each expert's load.
        world_size: W.
        slots_per_rank: s.

    Returns:
        (rank_X, expert_X), [X] int64 each; where all other ranks are full, a pair may repeat one of `pairs`.
    """
    num_experts = len(upper_E)
    num_pairs_E = np.bincount(pairs.expert_P, minlength=num_experts)
    num_pairs_W = np.bincount(pairs.rank_P, minlength=world_size)
    free_W = slots_per_rank - num_pairs_W
    num_spare_E = _spare_counts(upper_E, num_pairs_E, world_size, int(free_W.sum()))
    rank_X = _emptiest(num_pairs_W, free_W, int(num_spare_E.sum()))
    middle_E = np.bincount(pairs.expert_P, pairs.rank_P, num_experts) / num_pairs_E
    expert_X = np.repeat(np.arange(num_experts), num_spare_E)
    step_X = (_index_in_group(num_spare_E) + 1) * world_size / (num_spare_E[expert_X] + 1)
    target_X = (middle_E[expert_X] + step_X) % world_size
    expert_X = expert_X[np.argsort(target_X, kind="stable")]
    return rank_X, _without_repeats(rank_X, expert_X, pairs, (world_size, num_experts))


def _without_repeats(rank_X: np.ndarray, expert_X: np.ndarray, pairs: PairList, sizes: tuple[int, int]) -> np.ndarray:
    """[X]: `expert_X`, where an expert that its rank has already is swapped with a nearby one, if possible.

    sizes: W and E.
    """
    is_pair_WE = np.zeros(sizes, dtype=bool)
    is_pair_WE[pairs.rank_P, pairs.expert_P] = True
    expert_X = expert_X.copy()
    for distance in (1, -1, 2, -2, 3, -3):
        repeat = np.flatnonzero(is_pair_WE[rank_X, expert_X])
        if not len(repeat):
            break
        partner = repeat + distance
        is_inside = (partner >= 0) & (partner < len(rank_X))
        repeat, partner = repeat[is_inside], partner[is_inside]
        fits = ~is_pair_WE[rank_X[repeat], expert_X[partner]] & ~is_pair_WE[rank_X[partner], expert_X[repeat]]
        # No position takes part in two swaps.
        fits[1:] &= np.diff(repeat) > abs(distance)
        repeat, partner = repeat[fits], partner[fits]
        expert_X[repeat], expert_X[partner] = expert_X[partner], expert_X[repeat]
    return expert_X


def _emptiest(num_pairs_W: np.ndarray, free_W: np.ndarray, num_spare: int) -> np.ndarray:
    """[X] int64, ascending: ranks of `num_spare` free slots, the emptiest first; of equally empty ones, far apart.

    A free slot's level is how many pairs its rank has when it is filled. All slots of the lowest levels are used,
    and of the last level the middles of equal parts:

    level 1                   r1    r3            both
    level 2                r0 r1 r2 r3            2 of 4, the middles of r0 r1 | r2 r3 (rounded up): r1 and r3
    """
    rank = np.repeat(np.arange(len(free_W)), free_W)
    level = np.repeat(num_pairs_W, free_W) + _index_in_group(free_W)
    order = np.argsort(level, kind="stable")
    level = level[order]
    if num_spare < len(order):
        first, stop = np.searchsorted(level, [level[num_spare], level[num_spare] + 1])
        num_last = num_spare - first
        middles = (np.arange(num_last) * 2 + 1) * (stop - first) // (2 * max(num_last, 1))
        order = np.r_[order[:first], order[first:stop][middles]]
    return np.sort(rank[order])


def _spare_counts(upper_E: np.ndarray, num_pairs_E: np.ndarray, world_size: int, num_free: int) -> np.ndarray:
    """[E] int64: spare pairs of each expert. With too few slots, the next goes to the largest upper limit / pairs."""
    num_needed_E = np.clip(np.ceil(upper_E).astype(np.int64), num_pairs_E, world_size) - num_pairs_E
    expert = np.repeat(np.arange(len(upper_E)), num_needed_E)
    priority = upper_E[expert] / (num_pairs_E[expert] + _index_in_group(num_needed_E))
    chosen = np.argsort(-priority, kind="stable")[:num_free]
    return np.bincount(expert[chosen], minlength=len(upper_E))
