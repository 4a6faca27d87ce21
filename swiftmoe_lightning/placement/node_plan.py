"""How tokens travel in two steps: once to every node that has one of their experts, then on to the ranks inside it.

The W ranks lie in G nodes of n neighbours: rank r is number r % n of node r // n. In the first step a token goes from
its rank to the rank of the same number on another node, its *relay* there; ranks of one number are a *rail*. In the
second step the relay sends it to the ranks of its node. Results return the same way, summed on the relay.

P (rank, expert) pairs ordered by (rank, expert), d pairs of one rank, K top-k, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swiftmoe_lightning.placement.placement import Placement


@dataclass(frozen=True)
class LinkRows:
    """Rows of one exchange, of all ranks, by the links that they take; those that stay on their rank are left out.

    Attributes:
        inside: to another rank of the same node.
        between: to another node.
    """

    inside: int
    between: int

    def cost(self, between_bytes: float, inside_bytes: float, speed_ratio: float) -> float:
        """Bytes between nodes, and those inside them as what they slow links would send in the same time.

        Args:
            between_bytes: of a row, between nodes.
            inside_bytes: of a row, inside a node.
            speed_ratio: bytes a second inside a node over those between nodes.
        """
        return self.between * between_bytes + self.inside * inside_bytes / speed_ratio


@dataclass(frozen=True, eq=False)
class RelayPlan:
    """One rank's part of a `NodePlan`: its rail exchange, and as a relay its node exchange.

    Attributes:
        rail_send: [G] of its tokens, how many go to each node, its own included.
        rail_receive: [G] tokens that it gets from each node, as their relay.
        node_send: [n] assignments that it passes on to each rank of its node.
        node_receive: [n] assignments that it gets from each relay of its node.
        received_nd: [n, d] int64, the same for each of its experts.
        pairs: the pairs of its node.
    """

    rail_send: list[int]
    rail_receive: list[int]
    node_send: list[int]
    node_receive: list[int]
    received_nd: np.ndarray
    pairs: slice


class NodePlan:
    """Who sends how many tokens to which node, and how many assignments inside it.

    Args:
        rows_WG: [W, G] int64, tokens of each rank with an assignment on each node.
        sent_WP: [W, P] int64, assignments that each rank sends to each pair, after the cut at capacity.
        placement: which ranks have which expert.
        ranks_per_node: n, a divisor of W.
    """

    def __init__(self, rows_WG: np.ndarray, sent_WP: np.ndarray, placement: Placement, ranks_per_node: int) -> None:
        self._rows_WG, self._sent_WP = rows_WG, sent_WP
        self._placement, self._ranks_per_node = placement, ranks_per_node

    @property
    def num_assignments(self) -> int:
        """Of all ranks, those that stay on their rank included."""
        return int(self._sent_WP.sum())

    def for_rank(self, rank: int) -> RelayPlan:
        """The part of the plan that `rank` needs."""
        size, placement = self._ranks_per_node, self._placement
        node, number = divmod(rank, size)
        pairs, own = placement.pairs_of(node * size, (node + 1) * size), placement.pairs_of(rank, rank + 1)
        relayed_p = self._sent_WP[number::size, pairs].sum(0)
        received_nd = self._sent_WP[:, own].reshape(-1, size, own.stop - own.start).sum(0)
        first_n = placement.first_pair_W[node * size : (node + 1) * size] - pairs.start
        return RelayPlan(
            rail_send=self._rows_WG[rank].tolist(),
            rail_receive=self._rows_WG[number::size, node].tolist(),
            node_send=np.add.reduceat(relayed_p, first_n).tolist(),
            node_receive=received_nd.sum(1).tolist(),
            received_nd=received_nd,
            pairs=pairs,
        )

    @cached_property
    def _sent_WW(self) -> np.ndarray:
        return self._placement.sum_by_rank(self._sent_WP)

    @cached_property
    def flat(self) -> LinkRows:
        """What one exchange among all ranks sends, a row an assignment."""
        rank_W = np.arange(self._placement.world_size)
        is_node_WW = rank_W[:, None] // self._ranks_per_node == rank_W // self._ranks_per_node
        to_node = int(self._sent_WW[is_node_WW].sum())
        return LinkRows(to_node - int(self._sent_WW.trace()), int(self._sent_WW.sum()) - to_node)

    @cached_property
    def two_level(self) -> LinkRows:
        """What both steps send: a row a token between nodes, never more than `flat`; a row an assignment inside."""
        rank_W = np.arange(self._placement.world_size)
        is_relay_WW = rank_W[:, None] % self._ranks_per_node == rank_W % self._ranks_per_node
        node_W = rank_W // self._ranks_per_node
        return LinkRows(
            inside=int(self._sent_WW[~is_relay_WW].sum()),
            between=int(self._rows_WG.sum() - self._rows_WG[rank_W, node_W].sum()),
        )

    def pays(self, row_bytes: int, label_bytes: int, speed_ratio: float) -> bool:
        """Whether two steps cost less than one.

        Args:
            row_bytes: of a row there and back.
            label_bytes: of a token's experts and weights, which it takes along between nodes.
            speed_ratio: bytes a second inside a node over those between nodes; infinite if only the latter count.
        """
        two_level = self.two_level.cost(row_bytes + label_bytes, row_bytes, speed_ratio)
        return two_level < self.flat.cost(row_bytes, row_bytes, speed_ratio)
