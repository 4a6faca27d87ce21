"""How many replicas each expert gets, by popularity. L layers, E experts, S slots; vectorised over layers."""

from __future__ import annotations

import numpy as np


def uniform_replica_counts(num_experts: int, num_slots: int) -> np.ndarray:
    """Equally many replicas of each expert; where that leaves a remainder, the first experts get one more.

    Args:
        num_experts: E.
        num_slots: S.

    Returns:
        [E] int64 summing to `num_slots`.

    Raises:
        ValueError: if num_slots < E.
    """
    check_slots(num_experts, num_slots)
    return num_slots // num_experts + (np.arange(num_experts) < num_slots % num_experts)


def symi_replica_counts(popularity_LE: np.ndarray, num_slots: int) -> np.ndarray:
    """Replicas in proportion to popularity (SYMI, arXiv 2504.19925, Algorithm 1).

    Args:
        popularity_LE: [L, E] int64 assignments. A layer without any counts as uniform (the paper would divide by 0).
        num_slots: S.

    Returns:
        [L, E] int64, every entry >= 1, rows summing to `num_slots`.

    Raises:
        ValueError: if num_slots < E (the paper's loop would not end).
    """
    num_layers, num_experts = popularity_LE.shape
    check_slots(num_experts, num_slots)
    goal_LE = _positive_rows(popularity_LE)
    goal_LE = goal_LE / goal_LE.sum(1, keepdims=True) * num_slots
    counts_LE = np.floor(np.maximum(goal_LE, 1)).astype(np.int64)
    diff_LE = counts_LE - goal_LE
    surplus_L = counts_LE.sum(1) - num_slots
    while (over := np.flatnonzero(surplus_L > 0)).size:
        expert = diff_LE[over].argmax(1)
        removable = counts_LE[over, expert] > 1
        counts_LE[over, expert] -= removable
        surplus_L[over] -= removable
        # Also where nothing was removed: so the argmax moves on, and the loop ends.
        diff_LE[over, expert] -= 1
    while (under := np.flatnonzero(surplus_L < 0)).size:
        expert = diff_LE[under].argmin(1)
        counts_LE[under, expert] += 1
        diff_LE[under, expert] += 1
        surplus_L[under] += 1
    return counts_LE


def minmax_replica_counts(popularity_LE: np.ndarray, num_slots: int, max_replicas: int) -> np.ndarray:
    """Replicas that make the largest load of a replica, popularity / count, as small as it can be.

    The divisor method: count = ceil(popularity / load) for the least `load` whose counts fit; the slots
    left over go, one by one, to the largest remaining popularity / count (as in EPLB's replication).

    Args:
        popularity_LE: [L, E] int64 assignments. A layer without any counts as uniform.
        num_slots: S.
        max_replicas: the most an expert may have. E * max_replicas must reach num_slots.

    Returns:
        [L, E] int64, entries in 1..max_replicas, rows summing to `num_slots`.

    Raises:
        ValueError: if num_slots < E.
    """
    num_layers, num_experts = popularity_LE.shape
    check_slots(num_experts, num_slots)
    assert num_experts * max_replicas >= num_slots, (num_experts, max_replicas, num_slots)
    # Just above zero: slots that only cold experts can take are shared evenly among them.
    load_LE = np.maximum(_positive_rows(popularity_LE), 1e-9)

    def counts_at(limit_L: np.ndarray) -> np.ndarray:
        return np.clip(np.ceil(load_LE / limit_L[:, None]), 1, max_replicas).astype(np.int64)

    low_L, high_L = np.zeros(num_layers), load_LE.max(1)
    for _ in range(40):
        middle_L = (low_L + high_L) / 2
        fits_L = counts_at(np.maximum(middle_L, 1e-12)).sum(1) <= num_slots
        low_L, high_L = np.where(fits_L, low_L, middle_L), np.where(fits_L, middle_L, high_L)
    counts_LE = counts_at(high_L)
    spare_L = num_slots - counts_LE.sum(1)
    while (open_layers := np.flatnonzero(spare_L > 0)).size:
        counts = counts_LE[open_layers]
        share = np.where(counts < max_replicas, load_LE[open_layers] / counts, -1.0)
        counts_LE[open_layers, share.argmax(1)] += 1
        spare_L[open_layers] -= 1
    return counts_LE


def _positive_rows(popularity_LE: np.ndarray) -> np.ndarray:
    empty_L1 = popularity_LE.sum(1, keepdims=True) == 0
    return np.where(empty_L1, 1, popularity_LE).astype(np.float64)


def check_slots(num_experts: int, num_slots: int) -> None:
    """Make sure that the slots can hold every expert once.

    Args:
        num_experts: E.
        num_slots: S.

    Raises:
        ValueError: if num_slots < E.
    """
    if num_slots < num_experts:
        raise ValueError(
            f"{num_slots} slots cannot hold {num_experts} experts, and every expert keeps at least one replica. "
            f"Use at least {num_experts} slots in all."
        )
