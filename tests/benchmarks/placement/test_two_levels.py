"""The planned exchange of 32 ranks, token by token, agrees with the planner that training uses."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.placement.two_levels import RANKS, SYSTEMS, compare, draw, pairs_of_tokens, rows_of_links
from swiftmoe_lightning.analysis.model_sizes import ModelSizes
from swiftmoe_lightning.placement import Forecast, NodePlan, make_policy, plan_dispatch

MODEL = ModelSizes(num_layers=2, num_experts=64, top_k=8, dim=64, hidden_dim=32, dense_parameters=10_000)
PER_NODE = 8


def skewed() -> np.ndarray:
    weight_E = -np.log(np.arange(1.0, MODEL.num_experts + 1)).astype(np.float32)
    return draw(np.random.default_rng(0), weight_E, 32, MODEL.top_k)


def test_rows_are_those_of_the_plan_that_ranks_carry_out() -> None:
    ids_WTK = skewed()
    assert all(len(set(experts)) == MODEL.top_k for experts in ids_WTK.reshape(-1, MODEL.top_k).tolist())
    counts_WE = np.stack([np.bincount(ids.reshape(-1), minlength=MODEL.num_experts) for ids in ids_WTK])
    (placement,) = make_policy("balanced", RANKS, 4, PER_NODE).place(Forecast.of(counts_WE.sum(0)[None].astype(float)))
    plan = plan_dispatch(counts_WE, placement, ranks_per_node=PER_NODE)
    sent_WP = np.stack([plan.for_rank(rank).sent_P for rank in range(RANKS)])
    pairs_TK = pairs_of_tokens(ids_WTK[3], sent_WP[3], placement)
    assert np.array_equal(placement.pair_expert_P[pairs_TK], ids_WTK[3])
    assert np.array_equal(np.bincount(pairs_TK.reshape(-1), minlength=placement.num_pairs), sent_WP[3])

    flat_WW, rail_WG, inside_WW = rows_of_links(ids_WTK, plan, PER_NODE)
    nodes = NodePlan(rail_WG, sent_WP, placement, PER_NODE)
    node_W = np.arange(RANKS) // PER_NODE
    between_WW = node_W[:, None] != node_W
    assert nodes.flat.between == flat_WW[between_WW].sum()
    assert nodes.flat.inside == flat_WW[~between_WW].sum() - flat_WW.trace()
    assert nodes.two_level.inside == inside_WW.sum() - inside_WW.trace()
    # Of a token's 8 experts several are on one node.
    assert nodes.two_level.between < 0.7 * nodes.flat.between
    for rank in (0, 13):
        relay = nodes.for_rank(rank)
        node = slice(rank // PER_NODE * PER_NODE, rank // PER_NODE * PER_NODE + PER_NODE)
        assert relay.node_send == inside_WW[rank, node].tolist()


@pytest.mark.parametrize("routing", ["even", "skewed"])
def test_each_system_differs_in_what_it_says(routing: str) -> None:
    figures = compare(MODEL, "400 Gb/s a GPU", routing, 64, 2)
    assert figures.keys() == SYSTEMS.keys()
    assert figures["megatron"]["step_speedup"] == 1
    assert figures["dedup"]["imbalance"] == figures["megatron"]["imbalance"]
    assert figures["dedup"]["exchange_ms"] < figures["megatron"]["exchange_ms"]
    assert [name for name, numbers in figures.items() if numbers["weights_ms"]] == ["ours_flat", "ours", "ours_groups"]
    if routing == "skewed":
        assert figures["ours"]["imbalance"] < figures["hiermoe"]["imbalance"] < figures["megatron"]["imbalance"]
    for numbers in figures.values():
        parts = numbers["exchange_ms"] + numbers["weights_ms"] + numbers["compute_ms"]
        assert numbers["step_ms"] == pytest.approx(parts)
