"""What tokens send over links inside nodes and between them, on paper, at one level and at two.

Of a rank and micro-batch, forward and backward, where every expert is as likely as every other one. g ranks of an
expert group, on G nodes of n; E experts, K top-k, T tokens of a rank, r bytes of a row, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Final

from swiftmoe_lightning.analysis.scale import GroupCost

# There and back, forward and backward.
_EXCHANGES: Final = 4
# Of an assignment, between nodes at two levels: its pair, its weight, and the weight's gradient.
_LABEL_BYTES: Final = 3 * 4


@dataclass(frozen=True)
class TokenLinks:
    """Bytes that a rank sends in a micro-batch, and the seconds of all its exchanges of tokens.

    Attributes:
        inside_bytes: to other ranks of its node.
        between_bytes: to other nodes.
        seconds: without overlap of the exchanges.
    """

    inside_bytes: float
    between_bytes: float
    seconds: float


def flat_links(cost: GroupCost) -> TokenLinks:
    """One level, 4 L T K r bytes in all: 1 / g of them to each rank of the group.

    Args:
        cost: of a group.
    """
    size, n = cost.group_size, cost.ranks_per_node
    sent = _EXCHANGES * cost.model.num_layers * cost.token_bytes
    return TokenLinks(sent * (n - 1) / size, sent * (size - n) / size, cost.token_seconds)


def two_level_links(cost: GroupCost) -> TokenLinks | None:
    """Two levels: a row for each node that has one of a token's experts, and inside a node one for each assignment.

    Of a token's K experts, all different, none is on a given node with the chance (E - E / G) / E * (E - E / G - 1) /
    (E - 1) * ..., K factors.

    Args:
        cost: of a group.

    Returns:
        None for a group on one node, or with one rank a node.
    """
    size, n = cost.group_size, cost.ranks_per_node
    if not 1 < n < size:
        return None
    num_nodes, num_experts, layers = size // n, cost.model.num_experts, cost.model.num_layers
    elsewhere = num_experts - num_experts / num_nodes
    is_absent = prod(max(elsewhere - k, 0) / (num_experts - k) for k in range(cost.model.top_k))
    to_each_node = cost.workload.tokens * (1 - is_absent)
    row_bytes = cost.workload.row_bytes(cost.model.dim)
    between = to_each_node * (_EXCHANGES * row_bytes + _LABEL_BYTES * cost.model.top_k)
    inside = _EXCHANGES * cost.token_bytes / n
    exchanges = (
        cost.cluster.exchange_seconds(n - 1, 0, inside / _EXCHANGES),
        cost.cluster.exchange_seconds(0, num_nodes - 1, between / _EXCHANGES),
    )
    return TokenLinks(
        inside_bytes=layers * (n - 1) * inside,
        between_bytes=layers * (num_nodes - 1) * between,
        seconds=layers * _EXCHANGES * sum(exchanges),
    )
