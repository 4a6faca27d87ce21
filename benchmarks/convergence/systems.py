"""The systems that are compared, and which assignments each of them drops.

W ranks, T tokens of one rank, K top-k, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.analysis.candidates import CANDIDATES, Candidate
from swiftmoe_lightning.distributed import to_device
from swiftmoe_lightning.modules.dispatch import sort_by_pair, sorting_tables
from swiftmoe_lightning.ops import sort_assignments
from swiftmoe_lightning.placement import Capacity, ExpertLoad, Placement, plan_dispatch

# `deepspeed.moe.layer.MoE` computes at least so many assignments of each rank for each expert.
DEEPSPEED_MIN_CAPACITY: Final = 4


@dataclass(frozen=True, kw_only=True)
class System:
    """How experts are placed, and what is dropped.

    Attributes:
        candidate: its policy, token split, and what has a budget.
        capacity: "budgets" drops the lowest router scores over a rank's or a slot's budget; "deepspeed" gives each
            source rank a budget for each expert, and drops at random; "none" drops nothing.
        keeps_state_with_weights: an expert's optimizer state lives where its weights do, so each replica is on a rank
            of its own, and a replica that moves takes the state along.
    """

    candidate: Candidate
    capacity: str = "budgets"
    keeps_state_with_weights: bool = False


SYSTEMS: Final[Mapping[str, System]] = {
    "deepspeed": System(candidate=CANDIDATES["static"], capacity="deepspeed", keeps_state_with_weights=True),
    **{
        name: System(candidate=CANDIDATES[name], keeps_state_with_weights=True)
        for name in ("static", "flexmoe-100", "flexmoe-50", "flexmoe-10")
    },
    **{name: System(candidate=CANDIDATES[name]) for name in ("symi", "packed", "balanced")},
    "dropless": System(candidate=CANDIDATES["balanced"], capacity="none"),
}


def keep_within_budgets(
    expert_ids_WTK: Tensor, scores_WTK: Tensor, placement: Placement, candidate: Candidate, factor: float | None
) -> tuple[Tensor, ExpertLoad]:
    """Which assignments W real ranks would compute, and the load they would have: the product's own plan and choice.

    Args:
        expert_ids_WTK: [W, T, K] int64.
        scores_WTK: [W, T, K] floating, the router's weights.
        placement: where the experts are.
        candidate: token split, and what has a budget.
        factor: capacity factor; None drops nothing.

    Returns:
        ([W, T, K] bool, the load).
    """
    sorted_by_rank = [sort_assignments(ids_TK, placement.num_experts) for ids_TK in expert_ids_WTK]
    counts_WE = torch.stack([order.counts_G for order in sorted_by_rank]).numpy().astype(np.int64)
    capacity = None if factor is None else Capacity(factor, candidate.capacity_per)
    plan = plan_dispatch(counts_WE, placement, candidate.split, capacity)
    load = ExpertLoad.of(counts_WE, plan, placement)
    if not plan.num_dropped_tokens:
        return torch.ones_like(expert_ids_WTK, dtype=torch.bool), load
    kept = []
    for rank, (order, scores_TK) in enumerate(zip(sorted_by_rank, scores_WTK, strict=True)):
        rank_plan = plan.for_rank(rank)
        tables = to_device(scores_TK.device, *sorting_tables(plan, rank_plan))
        kept.append(sort_by_pair(order, scores_TK, rank_plan, tables).rows_TK >= 0)
    return torch.stack(kept), load


def keep_as_deepspeed(
    expert_ids_WTK: Tensor, placement: Placement, factor: float, random_WTE: Tensor
) -> tuple[Tensor, ExpertLoad]:
    """Which assignments DeepSpeed's gates compute: so many of each source rank for each expert.

    `deepspeed.moe.sharded_moe`: a rank's capacity for an expert is its assignments over E times the factor, and at
    least 4. Over it, top-1 keeps a random choice (`use_rts=True`, its default), and top-2 first choices before second
    ones, each in the order of the tokens. More than two choices are kept by another rule of its, which is not here.

    Args:
        expert_ids_WTK: [W, T, K] int64.
        placement: where the experts are; DeepSpeed's is uniform, and stays.
        factor: capacity factor.
        random_WTE: [W, T, E], as `deepspeed` draws it in each gate: the largest survive.

    Returns:
        ([W, T, K] bool, the load that the kept ones give).

    Raises:
        ValueError: for K > 2.
    """
    num_ranks, num_tokens, top_k = expert_ids_WTK.shape
    if top_k > 2:
        raise ValueError(f'"deepspeed" is emulated for top-1 and top-2, got top-{top_k}. Leave the system out.')
    num_experts = placement.num_experts
    capacity = max(math.ceil(num_tokens * top_k / num_experts * factor), DEEPSPEED_MIN_CAPACITY)
    key = (expert_ids_WTK + num_experts * torch.arange(num_ranks).view(-1, 1, 1)).flatten()
    if top_k == 1:
        first = random_WTE.gather(2, expert_ids_WTK).flatten().argsort(descending=True, stable=True)
    else:
        first = torch.arange(len(key)).view(-1, top_k).T.flatten()
    order = sort_assignments(key[first].unsqueeze(1), num_ranks * num_experts)
    place = torch.empty_like(key)
    place[first] = order.rows_TK.flatten().long()
    counts = order.counts_G.long()
    kept = place - (counts.cumsum(0) - counts)[key] < capacity
    counts_WE = counts.view(num_ranks, num_experts).numpy()
    load_W = plan_dispatch(np.minimum(counts_WE, capacity), placement, "uniform").load_W
    wanted_W = plan_dispatch(counts_WE, placement, "uniform").load_W
    load = ExpertLoad(placement, counts_WE, wanted_W, load_W, capacity * num_experts)
    return kept.view(expert_ids_WTK.shape), load


def weigh_as_deepspeed(weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """The weights of what DeepSpeed keeps: with top-2 each token's kept ones sum to 1 (`sharded_moe.top2gating`).

    So a token that lost one of its two choices takes the other with weight 1. Top-1 weights stay as they are.

    Args:
        weights_TK: [T, K] floating, the router's.
        kept_TK: [T, K] bool.

    Returns:
        [T, K], differentiable; 0 for what is dropped.
    """
    kept_weights_TK = weights_TK * kept_TK
    if weights_TK.shape[1] == 1:
        return kept_weights_TK
    least = torch.finfo(weights_TK.dtype).eps
    return kept_weights_TK / kept_weights_TK.sum(1, keepdim=True).clamp(min=least)
