"""Bytes and seconds of tokens on links inside nodes and between them, on paper."""

from __future__ import annotations

import numpy as np
import pytest

from swiftmoe_lightning.analysis import Cluster, GroupCost, ModelSizes, Workload
from swiftmoe_lightning.analysis.token_links import flat_links, two_level_links
from swiftmoe_lightning.placement import NodePlan, Placement
from tests.analysis.test_scale import cost
from tests.placement.test_node_plan import routed


def test_two_nodes_of_two_ranks_send_what_is_worked_out_by_hand() -> None:
    # 16 tokens with 2 of 4 experts, as 8 numbers of 2 bytes; 2 layers. Links: 100 bytes/s and 0.5 s in a node, else 10
    # bytes/s and 2 s.
    flat, two_level = flat_links(cost(4)), two_level_links(cost(4))
    assert two_level is not None
    # 32 rows of 16 bytes, 4 times a layer: a quarter to the neighbour, a half to the other node.
    assert (flat.inside_bytes, flat.between_bytes) == (1024, 2048)
    assert flat.seconds == cost(4).token_seconds
    # A node has none of a token's experts in 1 case of 6: 40 / 3 rows to the other one, of 16 bytes 4 times and labels
    # of 2 * 12 once. Half of the 32 assignments go on to the other rank of their node.
    assert two_level.between_bytes == pytest.approx(2 * 40 / 3 * (64 + 24))
    assert two_level.inside_bytes == 2 * 16 * 64
    # A quarter of them in each of four exchanges a layer.
    assert two_level.seconds == pytest.approx(2 * 4 * (0.5 + 256 / 100 + 2 + 40 / 3 * 88 / 4 / 10))


@pytest.mark.parametrize(("size", "ranks_per_node"), [(2, 2), (4, 1), (4, 8)])
def test_a_group_on_one_node_and_one_rank_a_node_have_one_level(size: int, ranks_per_node: int) -> None:
    assert two_level_links(cost(size, ranks_per_node=ranks_per_node)) is None


def test_the_formulas_hold_for_random_routing() -> None:
    model = ModelSizes(num_layers=1, num_experts=16, top_k=4, dim=1, hidden_dim=1, dense_parameters=0)
    expected = GroupCost(model, Cluster(num_ranks=16, ranks_per_node=4), Workload(tokens=100), 16)
    rows_WG, sent_WP = routed(np.random.default_rng(0), Placement(np.arange(16), 16, 16), [100] * 16, 4, 4)
    plan = NodePlan(rows_WG, sent_WP, Placement(np.arange(16), 16, 16), 4)
    flat, two_level = flat_links(expected), two_level_links(expected)
    assert two_level is not None
    # Rows of all 16 ranks, 4 times 2 bytes, and 12 bytes for each of 4 choices in the label.
    assert 16 * flat.inside_bytes == pytest.approx(8 * plan.flat.inside, rel=0.03)
    assert 16 * flat.between_bytes == pytest.approx(8 * plan.flat.between, rel=0.03)
    assert 16 * two_level.inside_bytes == pytest.approx(8 * plan.two_level.inside, rel=0.03)
    assert 16 * two_level.between_bytes == pytest.approx((8 + 48) * plan.two_level.between, rel=0.03)
