"""The groups in which tokens travel at two levels: between nodes, and inside one. n ranks of a node, G nodes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from swiftmoe_lightning.distributed.group import RankGroup

# What a rank sends to each peer when speeds are measured, and how often; the fastest time counts.
_PROBE_BYTES = 2**20
_PROBE_RUNS = 5


@dataclass(frozen=True, eq=False)
class NodeGroups:
    """The ranks of an expert group, as nodes of n neighbours each.

    Attributes:
        everyone: the expert group.
        node: the n ranks of this rank's node.
        rail: the G ranks, one of each node, that have the same number on their node.
        speed_ratio: bytes a second inside a node over those between nodes; infinite if only the latter count.
    """

    everyone: RankGroup
    node: RankGroup
    rail: RankGroup
    speed_ratio: float


def make_node_groups(
    everyone: RankGroup, ranks_per_node: int, device: torch.device, exchange: str
) -> NodeGroups | None:
    """The groups for the exchange of tokens at two levels. A collective of the expert group.

    Args:
        everyone: the expert group.
        ranks_per_node: neighbouring ranks of it that share a node.
        device: of the tokens.
        exchange: "flat", "two_level", or "auto", which measures both kinds of links.

    Returns:
        None where tokens travel at one level: if it is wanted so, on one node, with one rank a node, on nodes of
        differently many ranks, and where links between nodes were measured to be as fast as those inside.
    """
    if exchange == "flat" or not 1 < ranks_per_node < everyone.size or everyone.size % ranks_per_node:
        return None
    node, number = divmod(everyone.rank, ranks_per_node)
    members = range(node * ranks_per_node, (node + 1) * ranks_per_node)
    rail = range(number, everyone.size, ranks_per_node)

    def groups_of(speed_ratio: float) -> NodeGroups:
        return NodeGroups(everyone, everyone.part(members, device.type), everyone.part(rail, device.type), speed_ratio)

    # The groups that are measured are not those that count the bytes of tokens.
    speed_ratio = measure_speed_ratio(groups_of(math.inf), device) if exchange == "auto" else math.inf
    return groups_of(speed_ratio) if speed_ratio > 1 else None


def measure_speed_ratio(groups: NodeGroups, device: torch.device) -> float:
    """Bytes a second inside nodes over those between nodes, the same number on all ranks. A collective.

    All nodes exchange inside at once, then all rails at once, as they do in training.

    Args:
        groups: whose `speed_ratio` is not looked at.
        device: of the bytes.
    """
    inside, between = (measure_speed(ranks, groups.everyone, device) for ranks in (groups.node, groups.rail))
    return inside / between


def measure_speed(ranks: RankGroup, everyone: RankGroup, device: torch.device) -> float:
    """Bytes a second that a rank sends to others while it receives as many, the same number on all ranks. A collective.

    All groups exchange at once; the slowest rank counts.

    Args:
        ranks: a group of this rank's, of two or more.
        everyone: the ranks of all groups.
        device: of the bytes.
    """
    send = torch.zeros(ranks.size * _PROBE_BYTES, dtype=torch.uint8, device=device)
    splits = [_PROBE_BYTES] * ranks.size
    seconds = math.inf
    for _ in range(_PROBE_RUNS):
        # A number read from the device: so the collective, too, has ended.
        everyone.all_reduce(torch.zeros(1, device=device)).item()
        start = time.perf_counter()
        ranks.start_all_to_all(send, splits, splits).wait()[-1].item()
        seconds = min(seconds, time.perf_counter() - start)
    slowest = everyone.all_reduce(torch.tensor([seconds], device=device), dist.ReduceOp.MAX)
    return (ranks.size - 1) * _PROBE_BYTES / slowest.item()
