"""EPLB's placements. E experts, W ranks, s slots of a rank."""

from __future__ import annotations

import heapq

import numpy as np
from typing_extensions import override

from swiftmoe_lightning.placement import Forecast, Placement, PlacementPolicy
from swiftmoe_lightning.placement.replication import check_slots


class EPLBPolicy(PlacementPolicy):
    """Re-implementation of DeepSeek's expert parallelism load balancer (github.com/deepseek-ai/EPLB, `eplb.py`).

    Its three steps, under EPLB's names. replicate_experts: each spare slot goes to the expert with the most load
    a replica. balanced_packing: replicas by falling load to the lightest rank with a free slot. Hierarchical policy:
    groups of experts are packed to nodes first, and the rest happens within each node; with one node, or where nodes
    do not divide the groups, this is the global policy.

    EPLB serves inference and says nothing of optimizer states, so none move here. One rule is our own: a layer without
    tokens counts as uniform (EPLB would give all spare slots to one expert).

    Args:
        world_size: W.
        slots_per_rank: s.
        num_groups: groups of neighbouring experts.
        num_nodes: nodes of neighbouring ranks.

    Raises:
        ValueError: unless nodes divide the ranks and groups divide the experts.
    """

    def __init__(self, world_size: int, slots_per_rank: int, num_groups: int = 1, num_nodes: int = 1) -> None:
        super().__init__(world_size, slots_per_rank)
        if world_size % num_nodes:
            raise ValueError(f"num_nodes must divide the {world_size} ranks, got {num_nodes}. Use 1 for one node.")
        is_hierarchical = num_groups % num_nodes == 0
        self._num_groups, self._num_nodes = (num_groups, num_nodes) if is_hierarchical else (1, 1)

    @override
    def place(self, forecast: Forecast) -> list[Placement]:
        popularity_LE = forecast.popularity_LE
        num_experts = popularity_LE.shape[1]
        check_slots(num_experts, self.num_slots)
        if num_experts % self._num_groups:
            raise ValueError(f"num_groups must divide the {num_experts} experts, got {self._num_groups}.")
        load_LE = np.where(popularity_LE.sum(1, keepdims=True) == 0, 1.0, popularity_LE)
        return self.placements_of([self._table(load_E) for load_E in load_LE], num_experts)

    def _table(self, load_E: np.ndarray) -> np.ndarray:
        """[S] int64: the expert of every slot."""
        experts_by_group = np.arange(len(load_E)).reshape(self._num_groups, -1)
        slots_per_node = self.num_slots // self._num_nodes
        slots = []
        for groups in balanced_packing(load_E[experts_by_group].sum(1), self._num_nodes):
            experts = experts_by_group[groups].reshape(-1)
            replica_of = replicate_experts(load_E[experts], slots_per_node)
            share = load_E[experts] / np.bincount(replica_of)
            packs = balanced_packing(share[replica_of], self.world_size // self._num_nodes)
            slots.append(experts[replica_of[packs]].reshape(-1))
        return np.concatenate(slots)


def replicate_experts(load_E: np.ndarray, num_replicas: int) -> np.ndarray:
    """Give each spare replica to the expert with the most load a replica.

    Args:
        load_E: [E] assignments.
        num_replicas: in all.

    Returns:
        [num_replicas] int64, the expert of each replica: all experts once, then those that got another one, in order.
    """
    counts = [1] * len(load_E)
    heap = [(-load, expert) for expert, load in enumerate(load_E.tolist())]
    heapq.heapify(heap)
    extra = []
    for _ in range(num_replicas - len(load_E)):
        expert = heap[0][1]
        counts[expert] += 1
        heapq.heapreplace(heap, (-float(load_E[expert]) / counts[expert], expert))
        extra.append(expert)
    return np.array([*range(len(load_E)), *extra], dtype=np.int64)


def balanced_packing(item_weights: np.ndarray, num_packs: int) -> np.ndarray:
    """Pack items by falling weight into the lightest pack that is not full.

    Args:
        item_weights: each item's; the packs divide their number.
        num_packs: how many packs.

    Returns:
        [packs, items / packs] int64, the items of each.
    """
    pack_size = len(item_weights) // num_packs
    # With one item a pack, EPLB keeps the items' order.
    if pack_size == 1:
        return np.arange(len(item_weights))[:, None]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, pack) for pack in range(num_packs)]
    for item in np.argsort(-item_weights, kind="stable").tolist():
        weight, pack = heapq.heappop(heap)
        packs[pack].append(item)
        if len(packs[pack]) < pack_size:
            heapq.heappush(heap, (weight + float(item_weights[item]), pack))
    return np.array(packs)
