"""The fewest hosts that carry the load and its movement: a chain, and spare hosts across it.

L layers, E experts, W ranks, s slots of a rank, P hosted (rank, expert) pairs, X spare hosts. Loads are in budgets: 1
is the mean load of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.placement.forecast import Forecast
from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.policy import PlacementPolicy
from swiftmoe_lightning.placement.replication import check_slots

# See `Forecast.loads`. More hosts than are needed for `packed` to be even: here every host is there on purpose.
_COLD: Final = 0.3
# Below it an expert lives on one rank; above it, on the line that the chain cuts.
_WHOLE: Final = 0.5
# Overlaps this small are rounding.
_TINY: Final = 1e-6


class BalancedPolicy(PlacementPolicy):
    """As few hosts as carry the load evenly, and as many more as its movement asks for, up to s a rank.

    Both weight phases move bytes in proportion to P, so a replica in every slot is not free. A chain of at most
    E + W - 1 hosts carries the predicted loads exactly; expert e then gets spare hosts, until the load that it may
    come to, load + 3 * sqrt(spread * (load + 0.3)), is no more than a budget for each of its hosts.

    Args:
        world_size: W.
        slots_per_rank: s.
        ranks_per_node: neighbours on the chain are put on different nodes, so that an expert's hosts are near all
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
        hosts = chain_hosts(load_E, self.world_size, self.slots_per_rank)
        rank_X, expert_X = spare_hosts(hosts, upper_E, self.world_size, self.slots_per_rank)
        rank_P, expert_P = np.r_[hosts.rank_P, rank_X], np.r_[hosts.expert_P, expert_X]
        order_P = np.argsort(rank_P, kind="stable")
        num_W = np.bincount(rank_P, minlength=self.world_size)
        start_W = np.cumsum(num_W) - num_W
        slot_s = np.arange(self.slots_per_rank)
        table_Ws = expert_P[order_P][start_W[:, None] + slot_s % num_W[:, None]]
        return table_Ws[np.argsort(self._rank_of_position)].reshape(-1)


@dataclass(frozen=True, eq=False)
class HostList:
    """Hosted pairs of one layer. No pair is there twice.

    Attributes:
        rank_P: [P] int64, the rank of each pair.
        expert_P: [P] int64, the expert that it hosts.
        load_P: [P] float, budgets, the part of its load that goes there.
    """

    rank_P: np.ndarray
    expert_P: np.ndarray
    load_P: np.ndarray


def chain_hosts(load_E: np.ndarray, world_size: int, slots_per_rank: int) -> HostList:
    """Hosts that carry exactly `load_E`, at most E + W - 1 of them (McNaughton's wrap-around rule).

    Experts of less than half a budget live on one rank each, dealt by falling load to the lightest. The others lie
    on a line, and the ranks, each with what room it has left, cut it: neighbours share the expert at their cut, so
    that where a prediction is off, load can be passed along the chain.

    Args:
        load_E: [E] float, budgets, adding up to W.
        world_size: W.
        slots_per_rank: s, the most experts of a rank.
    """
    is_whole_E = load_E < _WHOLE
    order_E = np.argsort(-load_E, kind="stable")
    whole = order_E[is_whole_E[order_E]]
    taken_W = np.zeros(world_size)
    whole_rank = np.empty(len(whole), dtype=np.int64)
    for start in range(0, len(whole), world_size):
        batch = whole[start : start + world_size]
        ranks = np.argsort(taken_W, kind="stable")[: len(batch)]
        taken_W[ranks] += load_E[batch]
        whole_rank[start : start + world_size] = ranks
    line = order_E[~is_whole_E[order_E]]
    room_W = np.maximum(1 - taken_W, 0)
    room_W *= load_E[line].sum() / max(room_W.sum(), _TINY)
    stop_W, stop_H = np.cumsum(room_W), np.cumsum(load_E[line])
    start_H = stop_H - load_E[line]
    first_H = np.minimum(np.searchsorted(stop_W, start_H + _TINY, side="right"), world_size - 1)
    last_H = np.minimum(np.searchsorted(stop_W, stop_H - _TINY, side="left"), world_size - 1)
    num_H = np.maximum(last_H - first_H, 0) + 1
    offset_P = np.arange(num_H.sum()) - np.repeat(np.cumsum(num_H) - num_H, num_H)
    rank_P = np.repeat(first_H, num_H) + offset_P
    start_W = stop_W - room_W
    cut_P = np.minimum(np.repeat(stop_H, num_H), stop_W[rank_P]) - np.maximum(
        np.repeat(start_H, num_H), start_W[rank_P]
    )
    keep_P = (cut_P > _TINY) | (np.repeat(num_H, num_H) == 1)
    hosts = HostList(
        np.r_[whole_rank, rank_P[keep_P]],
        np.r_[whole, np.repeat(line, num_H)[keep_P]],
        np.r_[load_E[whole], cut_P[keep_P]],
    )
    return _fit_slots(hosts, world_size, slots_per_rank, len(load_E))


def _fit_slots(hosts: HostList, world_size: int, slots_per_rank: int, num_experts: int) -> HostList:
    """At most s experts a rank: of too many, those with the least load there go; what has no host left moves to the
    lightest rank with a free slot."""
    num_W = np.bincount(hosts.rank_P, minlength=world_size)
    if num_W.max() <= slots_per_rank:
        return hosts
    order_P = np.lexsort((-hosts.load_P, hosts.rank_P))
    place_P = np.arange(len(order_P)) - np.repeat(np.cumsum(num_W) - num_W, num_W)
    kept = np.sort(order_P[place_P < slots_per_rank])
    rank_P, expert_P, load_P = hosts.rank_P[kept], hosts.expert_P[kept], hosts.load_P[kept]
    homeless = np.setdiff1d(hosts.expert_P, expert_P)
    lost_E = np.bincount(hosts.expert_P, hosts.load_P, num_experts)
    for expert in homeless[np.argsort(-lost_E[homeless], kind="stable")]:
        num_W = np.bincount(rank_P, minlength=world_size)
        load_W = np.bincount(rank_P, load_P, world_size)
        rank = int(np.where(num_W < slots_per_rank, load_W, np.inf).argmin())
        if num_W[rank] == slots_per_rank:
            # Every rank is full: the least needed host of an expert that has several makes room.
            has_several_P = np.bincount(expert_P, minlength=num_experts)[expert_P] > 1
            leaves = int(np.where(has_several_P, load_P, np.inf).argmin())
            rank = int(rank_P[leaves])
            rank_P, expert_P, load_P = (np.delete(values, leaves) for values in (rank_P, expert_P, load_P))
        rank_P, expert_P, load_P = (
            np.append(rank_P, rank),
            np.append(expert_P, expert),
            np.append(load_P, lost_E[expert]),
        )
    return HostList(rank_P, expert_P, load_P)


def spare_hosts(
    hosts: HostList, upper_E: np.ndarray, world_size: int, slots_per_rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """Further hosts, until no expert's upper load is more than one budget a host, or all slots are used.

    An expert's spare hosts are spread evenly over the ranks, away from those it has, so that what it may need comes
    from parts of the chain that are far from one another.

    Args:
        hosts: the hosts that are there already.
        upper_E: [E] float, budgets, the most that each expert may come to.
        world_size: W.
        slots_per_rank: s.

    Returns:
        (rank_X, expert_X), [X] int64 each; a pair may be one that is there already, where all other ranks are full.
    """
    num_experts = len(upper_E)
    num_E = np.bincount(hosts.expert_P, minlength=num_experts)
    num_W = np.bincount(hosts.rank_P, minlength=world_size)
    free_W = slots_per_rank - num_W
    extra_E = _spare_counts(upper_E, num_E, world_size, int(free_W.sum()))
    num_extra = int(extra_E.sum())
    rank_X = _emptiest(num_W, free_W, num_extra)
    middle_E = np.bincount(hosts.expert_P, hosts.rank_P, num_experts) / num_E
    expert_X = np.repeat(np.arange(num_experts), extra_E)
    turn_X = np.arange(num_extra) - np.repeat(np.cumsum(extra_E) - extra_E, extra_E)
    target_X = (middle_E[expert_X] + (turn_X + 1) * world_size / (extra_E[expert_X] + 1)) % world_size
    return rank_X, _without_repeats(
        rank_X, expert_X[np.argsort(target_X, kind="stable")], hosts, (world_size, num_experts)
    )


def _without_repeats(rank_X: np.ndarray, expert_X: np.ndarray, hosts: HostList, sizes: tuple[int, int]) -> np.ndarray:
    """[X]: `expert_X`, in which an expert that its rank hosts already changes places with one next to it, if it can."""
    is_known = np.zeros(sizes, dtype=bool)
    is_known[hosts.rank_P, hosts.expert_P] = True
    expert_X = expert_X.copy()
    for apart in (1, -1, 2, -2, 3, -3):
        here = np.flatnonzero(is_known[rank_X, expert_X])
        if not len(here):
            break
        there = here + apart
        inside = (there >= 0) & (there < len(rank_X))
        here, there = here[inside], there[inside]
        fits = ~is_known[rank_X[here], expert_X[there]] & ~is_known[rank_X[there], expert_X[here]]
        # No place takes part in two swaps.
        fits[1:] &= np.diff(here) > abs(apart)
        here, there = here[fits], there[fits]
        expert_X[here], expert_X[there] = expert_X[there], expert_X[here]
    return expert_X


def _emptiest(num_W: np.ndarray, free_W: np.ndarray, num_extra: int) -> np.ndarray:
    """[X] int64, ascending: ranks of `num_extra` free slots, the emptiest first; of equally empty ones, far apart."""
    rank_F = np.repeat(np.arange(len(free_W)), free_W)
    level_F = np.repeat(num_W, free_W) + np.arange(len(rank_F)) - np.repeat(np.cumsum(free_W) - free_W, free_W)
    order_F = np.argsort(level_F, kind="stable")
    level_F = level_F[order_F]
    if num_extra < len(order_F):
        last = level_F[num_extra]
        first, stop = np.searchsorted(level_F, [last, last + 1])
        apart = (np.arange(num_extra - first) * 2 + 1) * (stop - first) // (2 * max(num_extra - first, 1))
        order_F = np.r_[order_F[:first], order_F[first:stop][apart]]
    return np.sort(rank_F[order_F])


def _spare_counts(upper_E: np.ndarray, num_E: np.ndarray, world_size: int, num_free: int) -> np.ndarray:
    """[E] int64: spare hosts of each expert; where slots are few, the largest upper / hosts gets the next one."""
    most_E = np.clip(np.ceil(upper_E).astype(np.int64), num_E, world_size) - num_E
    expert_C = np.repeat(np.arange(len(upper_E)), most_E)
    turn_C = np.arange(len(expert_C)) - np.repeat(np.cumsum(most_E) - most_E, most_E)
    priority_C = upper_E[expert_C] / (num_E[expert_C] + turn_C)
    chosen = np.argsort(-priority_C, kind="stable")[:num_free]
    return np.bincount(expert_C[chosen], minlength=len(upper_E))
