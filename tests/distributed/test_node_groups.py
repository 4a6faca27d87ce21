"""The groups in which tokens travel at two levels, and whether measured links ask for them."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from swiftmoe_lightning.distributed import RankGroup, make_node_groups, node_groups
from tests.helpers import run_ranks

CPU = torch.device("cpu")


def members(ranks_per_node: int) -> list[list[int]]:
    groups = make_node_groups(RankGroup(dist.group.WORLD), ranks_per_node, CPU, "two_level")
    if groups is None:
        return []
    again = make_node_groups(RankGroup(dist.group.WORLD), ranks_per_node, CPU, "two_level")
    assert again.node.process_group is groups.node.process_group
    assert math.isinf(groups.speed_ratio)
    # Each group exchanges its own ranks' numbers.
    mine = torch.tensor([dist.get_rank()])
    assert groups.node.all_gather(mine).flatten().tolist() == groups.node.ranks
    assert groups.rail.all_gather(mine).flatten().tolist() == groups.rail.ranks
    return [groups.node.ranks, groups.rail.ranks]


def test_a_rank_has_a_group_in_its_node_and_one_across_nodes() -> None:
    expected = [[[0, 1], [0, 2]], [[0, 1], [1, 3]], [[2, 3], [0, 2]], [[2, 3], [1, 3]]]
    assert run_ranks(members, 4, 2) == expected


@pytest.mark.parametrize("ranks_per_node", [1, 3, 4])
def test_one_node_single_ranks_and_ragged_nodes_have_one_level(ranks_per_node: int) -> None:
    assert run_ranks(members, 4, ranks_per_node) == [[]] * 4


def measured() -> tuple[float, int, list[float | None]]:
    everyone = RankGroup(dist.group.WORLD)
    groups = make_node_groups(everyone, 2, CPU, "two_level")
    ratio = node_groups.measure_speed_ratio(groups, CPU)
    chosen = []
    for measured_ratio in (0.5, 4.0):
        with patch.object(node_groups, "measure_speed_ratio", lambda *_, ratio=measured_ratio: ratio):
            auto = make_node_groups(everyone, 2, CPU, "auto")
        chosen.append(None if auto is None else auto.speed_ratio)
    auto = make_node_groups(everyone, 2, CPU, "auto")
    counted = 0 if auto is None else int(auto.node.bytes_to_others_n.sum() + auto.rail.bytes_to_others_n.sum())
    return ratio, counted, chosen


def test_links_are_measured_alike_on_all_ranks_and_the_probe_is_not_counted_as_tokens() -> None:
    ranks = run_ranks(measured, 4)
    assert len({ratio for ratio, _, _ in ranks}) == 1
    assert ranks[0][0] > 0
    assert all((counted, chosen) == (0, [None, 4.0]) for _, counted, chosen in ranks)
