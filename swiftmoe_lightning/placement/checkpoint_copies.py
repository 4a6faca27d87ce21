"""Which node keeps a second copy of which rank's part of a checkpoint, and how nodes get parts that they lack.

W ranks; nodes are numbered from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet


def copy_ranks(node_W: Sequence[int]) -> list[int | None]:
    """For each rank, the rank that keeps a copy of its part: the one of the same number on the next node.

    So every rank keeps about one copy, and any one node may be lost.

    Args:
        node_W: [W], the node that each rank is on.

    Returns:
        [W]; None on one node, which has no other.
    """
    nodes = sorted(set(node_W))
    ranks_of = {node: [rank for rank, other in enumerate(node_W) if other == node] for node in nodes}
    if len(nodes) == 1:
        return [None] * len(node_W)
    copies: list[int | None] = []
    for rank, node in enumerate(node_W):
        following = ranks_of[nodes[(nodes.index(node) + 1) % len(nodes)]]
        copies.append(following[ranks_of[node].index(rank) % len(following)])
    return copies


def plan_fetches(needed: Sequence[str], names_of: Sequence[AbstractSet[str]]) -> list[tuple[str, int, int]] | None:
    """The messages after which every node has all files.

    Args:
        needed: names of all files.
        names_of: the names of the files on each node.

    Returns:
        (file, from node, to node) for each file that a node lacks, each from the next node that has it, so that no node
        sends everything; None if no node has one of them.
    """
    num_nodes = len(names_of)
    fetches = []
    for name in needed:
        has = [name in names for names in names_of]
        if not any(has):
            return None
        for node in range(num_nodes):
            if not has[node]:
                others = [(node + step) % num_nodes for step in range(1, num_nodes)]
                fetches.append((name, next(other for other in others if has[other]), node))
    return fetches
