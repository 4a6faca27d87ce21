"""How an expert's load is shared by the ranks that have it.

W ranks, s slots of a rank, E experts, P (rank, expert) pairs.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from swiftmoe_lightning.placement.placement import Placement

# Exponents of the scaling steps below. Over-relaxed, to converge in fewer steps: 1.5 at first, later 1 and 3 in turn.
_EXPONENTS: Final = (1.5, 1.5, 1.5, *(1.0, 3.0) * 6, 1.0)
# The scaling ends when the largest load is at most this many times the mean.
_EVEN: Final = 1.002


def uniform_shares(load_E: np.ndarray, placement: Placement) -> np.ndarray:
    """Cut each expert's load in equal parts, one a slot, at whole assignments.

    Args:
        load_E: [E] int64, assignments.
        placement: the slots.

    Returns:
        [P] int64; each expert's parts add up to its load.
    """
    slots_P = placement.pair_slots_P[placement.by_expert_P]
    return _cut_at_whole_tokens(load_E, slots_P, placement)


def rank_loads(popularity_E: np.ndarray, table_Ws: np.ndarray) -> np.ndarray:
    """What every rank computes where each slot takes an equal part of its expert's popularity.

    Args:
        popularity_E: [E] assignments.
        table_Ws: [W, s] int64, the expert in each slot of each rank.

    Returns:
        [W] float.
    """
    counts_E = np.bincount(table_Ws.reshape(-1), minlength=len(popularity_E))
    return (popularity_E / counts_E)[table_Ws].sum(1)


def balanced_shares(load_E: np.ndarray, placement: Placement) -> np.ndarray:
    """Cut the experts' loads in parts that make the ranks' loads as even as the placement allows.

    The most even loads have both the smallest maximum and the fewest assignments over any budget, so one split serves
    training with a capacity and without. It is computed by matrix scaling (Sinkhorn, 1967): every rank has a weight, an
    expert's load is shared in proportion to the weights of its ranks, and the weights of busy ranks are lowered until
    the loads are as even as the placement allows.

    Args:
        load_E: [E] int64, assignments.
        placement: which ranks have which expert.

    Returns:
        [P] int64; each expert's parts add up to its load.
    """
    weight_W = scaling_weights(load_E, placement)
    return _cut_at_whole_tokens(load_E, weight_W[placement.pair_rank_P[placement.by_expert_P]], placement)


def scaling_weights(load_E: np.ndarray, placement: Placement) -> np.ndarray:
    """The ranks' weights in the most even split; a low weight marks a rank that the placement makes busy.

    Args:
        load_E: [E] assignments.
        placement: which ranks have which expert.

    Returns:
        [W] float.
    """
    rank_P, expert_P, by_expert_P = placement.pair_rank_P, placement.pair_expert_P, placement.by_expert_P
    first_E, first_W = placement.first_pair_E, placement.first_pair_W
    mean = load_E.sum() / placement.world_size
    weight_W = np.ones(placement.world_size)
    rank_by_expert_P = rank_P[by_expert_P]
    for exponent in _EXPONENTS if mean else ():
        per_weight_E = load_E / np.add.reduceat(weight_W[rank_by_expert_P], first_E)
        load_W = weight_W * np.add.reduceat(per_weight_E[expert_P], first_W)
        if load_W.max() <= _EVEN * mean:
            break
        weight_W *= (mean / np.maximum(load_W, 1e-9 * mean)) ** exponent
        # Where loads cannot be even, weights would run off to 0 and infinity. (`np.clip` is slow on short arrays.)
        np.minimum(np.maximum(weight_W, 1e-12), 1e12, out=weight_W)
    return weight_W


def _cut_at_whole_tokens(load_E: np.ndarray, part_P: np.ndarray, placement: Placement) -> np.ndarray:
    """[P]: `load_E` shared in proportion to `part_P` (ordered by expert), rounded down where the parts meet.

    an expert's load of 10       0 . . . . . . . . . 10
    part_P of its three pairs    |  0.5   |   1  |   1  |
    stop_P                           2        6     10        2.0, 6.0, 10 (rounded down; the last one is the load)
    share_P                          2        4      4
    """
    first_E, expert_P = placement.first_pair_E, placement.pair_expert_P[placement.by_expert_P]
    # [P] in 0..1, where a pair's part ends in its expert's load. Parts are divided by their expert's sum first, since
    # those of different experts may differ by many orders of magnitude. Each expert's then add up to 1, so that in the
    # sum over all pairs the experts before expert e add e.
    end_P = np.cumsum(part_P / np.add.reduceat(part_P, first_E)[expert_P]) - expert_P
    # The small number keeps a product that is whole but for rounding from being rounded down to the next lower one.
    stop_P = np.floor(load_E[expert_P] * end_P + 1e-6).astype(np.int64)
    stop_P[np.append(first_E[1:], len(part_P)) - 1] = load_E
    share_P = np.diff(stop_P, prepend=0)
    share_P[first_E] = stop_P[first_E]
    share_by_rank_P = np.empty_like(share_P)
    share_by_rank_P[placement.by_expert_P] = share_P
    return share_by_rank_P
