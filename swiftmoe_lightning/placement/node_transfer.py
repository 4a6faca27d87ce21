"""The two weight exchanges at two levels: gradients are summed in a node before they leave it, weights enter it once.

The W ranks lie in G nodes of n neighbours: rank r is number r % n of node r // n; ranks of one number are a *rail*.
Rank j owns rows `shard_rows(rows, W)[j]` of every expert. Collect, of one layer:

    inside     each rank sends, to number k of its node, the rows of its gradients that the ranks of rail k own
    sum        number k adds up the node's replicas of each expert
    between    it sends each rank of its rail that rank's rows of the node's X experts
    sum        the owner adds up the nodes

Distribute is the same backwards: an owner sends its rows of each node's experts along the rail, and the rank that gets
them sends them on to the ranks of its node that have the expert.

P (rank, expert) pairs, X different experts on a node, d different experts on a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from swiftmoe_lightning.placement.placement import Placement
from swiftmoe_lightning.placement.transfer import TransferPlan, shard_elements, shard_rows


@dataclass(frozen=True, eq=False)
class NodeTransfer:
    """One rank's exchanges of one layer.

    Attributes:
        nodes: the placement with nodes for ranks, so that its pairs are (node, expert).
        inside: the placement of this rank's node alone: its n ranks, and its X experts by their index among the node's.
        collect_inside: elements between the n ranks of the node.
        collect_between: elements between the G ranks of the rail.
    """

    nodes: Placement
    inside: Placement
    collect_inside: TransferPlan
    collect_between: TransferPlan

    @property
    def distribute_between(self) -> TransferPlan:
        """`collect_between` backwards."""
        return _reverse(self.collect_between)

    @property
    def distribute_inside(self) -> TransferPlan:
        """`collect_inside` backwards."""
        return _reverse(self.collect_inside)


def plan_node_transfer(
    placement: Placement, row_elements: Sequence[tuple[int, int]], rank: int, ranks_per_node: int
) -> NodeTransfer:
    """How one rank's gradients and weights travel at two levels.

    Between nodes all ranks together send G_e * (P_G - P_G / G) elements, where G divides the rows, G_e being the
    elements of one expert and P_G the (node, expert) pairs: each at most P, which one level sends.

    Args:
        placement: which ranks have which expert.
        row_elements: for each tensor of an expert, its rows and the elements of one row.
        rank: whose.
        ranks_per_node: n, a divisor of W.
    """
    size = ranks_per_node
    node, number = divmod(rank, size)
    nodes = Placement(placement.slot_to_expert_S, placement.num_experts, placement.world_size // size)
    experts_X = nodes.experts_of(node)
    table_ns = placement.table_Ws[node * size : (node + 1) * size]
    inside = Placement(np.searchsorted(experts_X, table_ns.reshape(-1)), len(experts_X), size)
    owned_Gn = shard_elements(tuple(row_elements), placement.world_size).reshape(-1, size)
    return NodeTransfer(
        nodes=nodes,
        inside=inside,
        collect_inside=TransferPlan(inside.num_pairs_W, owned_Gn.sum(0)),
        collect_between=TransferPlan(nodes.num_pairs_W, owned_Gn[:, number]),
    )


def _reverse(plan: TransferPlan) -> TransferPlan:
    return TransferPlan(plan.destination_W, plan.source_W)


@dataclass(frozen=True)
class RailBlock:
    """The part of a rank's buffer for some peers that own equally many rows of every tensor.

    The block is [numbers, nodes, d experts of the rank, elements], and the elements are the peer's rows of each tensor,
    one tensor after the other.

    Attributes:
        numbers: of the peers on their nodes.
        nodes: of the peers.
        offset: of the block's first element in the buffer.
        rows: for each tensor, the rows that the peers own: [nodes, numbers, rows of a peer], flattened.
        widths: for each tensor, the elements in the rows of one peer.
    """

    numbers: range
    nodes: range
    offset: int
    rows: tuple[range, ...]
    widths: tuple[int, ...]


@lru_cache(maxsize=1024)
def plan_rail_buffer(
    row_elements: tuple[tuple[int, int], ...], world_size: int, ranks_per_node: int, num_experts: int
) -> tuple[RailBlock, ...]:
    """Where every row of a rank's experts lies in the buffer that it sends in collect, and gets in distribute.

    As `plan_buffer`, with the peers by rail: by number, then by node. What number k gets from a rank of its node is
    then [G, d, elements of the rank on node 0, 1, ...], and what it sends on, [G, X, ...], has the same order.

        peer         0 (node 0)      2 (node 1)      1 (node 0)      3 (node 1)      of 2 nodes of 2 ranks
        expert     | e0  | e1    | e0  | e1    | e0  | e1    | e0  | e1  |
        rows of A  | 0   | 0     | 2   | 2     | 1   | 1     | 3   | 3   |         of 4
                   |---- for number 0 ---------|---- for number 1 -------|

    Args:
        row_elements: for each tensor of an expert, its rows and the elements of one row.
        world_size: W.
        ranks_per_node: n, a divisor of W.
        num_experts: d, the different experts on this rank.

    Returns:
        The blocks, in the order of their offsets: one of all peers where they own equally many rows, else one a peer.
    """
    size, num_nodes = ranks_per_node, world_size // ranks_per_node
    shards = [shard_rows(num_rows, world_size) for num_rows, _ in row_elements]
    if all(num_rows % world_size == 0 for num_rows, _ in row_elements):
        widths = tuple(num_rows // world_size * width for num_rows, width in row_elements)
        rows = tuple(range(num_rows) for num_rows, _ in row_elements)
        return (RailBlock(range(size), range(num_nodes), 0, rows, widths),)
    blocks, offset = [], 0
    for number in range(size):
        for node in range(num_nodes):
            rows = tuple(range(*shard[node * size + number]) for shard in shards)
            widths = tuple(len(own) * width for own, (_, width) in zip(rows, row_elements, strict=True))
            blocks.append(RailBlock(range(number, number + 1), range(node, node + 1), offset, rows, widths))
            offset += num_experts * sum(widths)
    return tuple(blocks)
