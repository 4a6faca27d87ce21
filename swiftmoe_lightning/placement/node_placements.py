"""A placement on nodes of several ranks, as two: of experts on nodes, and inside one node on its ranks.

Weights then enter a node once, and gradients are summed in it before they leave. The W ranks lie in G nodes of n
neighbours: rank r is number r % n of node r // n; ranks of one number are a *rail*. Rows are cut over the n numbers
first, and each part over the G nodes. Collect, of one layer:

    inside     each rank sends, to number k of its node, its gradients' rows of part k, which adds up the replicas
    between    number k sends, to each rank of its rail, that rank's rows of the node's X experts; the owner adds up

Distribute is the same backwards. Both exchanges are of ranks that own rows and ranks that have experts, as the one
exchange at one level is.
"""

from __future__ import annotations

import numpy as np

from swiftmoe_lightning.placement.placement import Placement


def node_placements(placement: Placement, rank: int, ranks_per_node: int) -> tuple[Placement, Placement]:
    """The placement as seen between nodes, and inside the node of one rank.

    Between nodes all ranks together send P_G - P_G / G experts (P_G being the (node, expert) pairs) in each exchange
    where ranks divide the rows; at one level up to P - P / G.

    Args:
        placement: which ranks have which expert.
        rank: whose node.
        ranks_per_node: n, a divisor of W.

    Returns:
        E experts on G nodes; and the node's X experts, by their index among these, on its n ranks.
    """
    nodes = Placement(placement.slot_to_expert_S, placement.num_experts, placement.world_size // ranks_per_node)
    experts_X = nodes.experts_of(rank // ranks_per_node)
    table_ns = placement.table_Ws[rank // ranks_per_node * ranks_per_node :][:ranks_per_node]
    inside = Placement(np.searchsorted(experts_X, table_ns.reshape(-1)), len(experts_X), ranks_per_node)
    return nodes, inside
