"""What a change of placement leaves to do for weights that have not changed since they were sent.

Those of an expert that a rank has already stay there, in another of its slots perhaps; the others are sent, as for all
weights, from the owners of their rows. W ranks, E experts, P pairs of the later placement, ordered by (rank, expert).
"""

from __future__ import annotations

import numpy as np

from swiftmoe_lightning.placement.placement import Placement


def plan_moves(before: Placement, later: Placement, rank: int) -> list[tuple[int, int]]:
    """The experts that stay on a rank and change their index in its slots.

    An expert's index is its place among those of the rank, in ascending order, so experts that stay keep their order.
    Those that move down, the lowest first, and then those that move up, the highest first, therefore overwrite nothing
    that is still to be moved, and need no other memory.

    Args:
        before: of the slots as they are.
        later: as they will be.
        rank: of 0..W-1.

    Returns:
        (index before, index later), in the order in which they are to be copied.
    """
    _, before_i, later_i = np.intersect1d(before.experts_of(rank), later.experts_of(rank), True, return_indices=True)
    moves = list(zip(before_i.tolist(), later_i.tolist(), strict=True))
    return [m for m in moves if m[1] < m[0]] + [m for m in reversed(moves) if m[1] > m[0]]


def arriving_indices(placement: Placement, rank: int, arrives_P: np.ndarray | None) -> np.ndarray:
    """Which of the experts of a rank arrive, by their place among them.

    Args:
        placement: which ranks have which expert.
        rank: of 0..W-1.
        arrives_P: [P] bool; None for all.

    Returns:
        Ascending, int64.
    """
    if arrives_P is None:
        return np.arange(placement.num_pairs_W[rank])
    return np.flatnonzero(arrives_P[placement.pairs_of(rank, rank + 1)])


def node_arrivals(
    arrives_P: np.ndarray, placement: Placement, rank: int, ranks_per_node: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs that are sent at two levels, when of a placement only some are. See `node_placements`.

    Args:
        arrives_P: [P] bool, the pairs that are sent.
        placement: which ranks have which expert.
        rank: whose node.
        ranks_per_node: n, a divisor of W.

    Returns:
        [pairs] bool each: the (node, expert) pairs of which a rank of the node is sent the expert, and the pairs inside
        the rank's node that are sent.
    """
    first = rank // ranks_per_node * ranks_per_node
    node_P = placement.pair_rank_P // ranks_per_node
    # Sorted as the pairs of a placement on nodes are.
    pairs, pair_P = np.unique(node_P * placement.num_experts + placement.pair_expert_P, return_inverse=True)
    between = np.bincount(pair_P, arrives_P, len(pairs)) > 0
    return between, arrives_P[placement.pairs_of(first, first + ranks_per_node)]
