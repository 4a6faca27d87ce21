"""With a capacity, W real ranks drop the tokens that an emulation of W ranks in one process drops."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.placement import Capacity, Placement, plan_dispatch
from tests.engine import models
from tests.helpers import run_ranks

TOKENS, DIM, EXPERTS, TOP_K = 30, 6, 5, 2


def build(factor: float, per: str) -> sml.MoE:
    torch.manual_seed(1)
    return sml.MoE(DIM, 8, EXPERTS, TOP_K, capacity_factor=factor, capacity_per=per, bias=True).double()


def tokens(world_size: int) -> list[Tensor]:
    """Each rank's tokens: differently many, drawn to a few hot experts."""
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[::2] = x[0] + 0.3 * x[::2]
    bounds = [round(TOKENS * (rank / world_size) ** 1.2) for rank in range(world_size + 1)]
    return [x[start:stop] for start, stop in pairwise(bounds)]


def emulate(
    moe: sml.MoE, parts: list[Tensor], placement: Placement, factor: float, per: str
) -> tuple[list[Tensor], int]:
    """Each rank's output, by loops over ranks, assignments and budgets; and how many assignments were dropped."""
    routed = [moe.router(part) for part in parts]
    counts_WE = np.zeros((len(parts), EXPERTS), dtype=np.int64)
    for rank, r in enumerate(routed):
        for expert in r.expert_ids_TK.flatten().tolist():
            counts_WE[rank, expert] += 1
    plan = plan_dispatch(counts_WE, placement, "balanced", Capacity(factor, per))
    pairs = list(zip(placement.pair_rank_P.tolist(), placement.pair_expert_P.tolist(), strict=True))
    outputs, num_dropped = [], 0
    for rank, (part, r) in enumerate(zip(parts, routed, strict=True)):
        # Pairs of an expert in the order of their expert ranks; an expert's assignments in the order of their tokens.
        room = {
            expert: [[plan.for_rank(rank).sent_P[d], d] for d, pair in enumerate(pairs) if pair[1] == expert]
            for expert in range(EXPERTS)
        }
        by_budget = defaultdict(list)
        for t, k in np.ndindex(len(part), TOP_K):
            expert = int(r.expert_ids_TK[t, k])
            place = next(place for place in room[expert] if place[0] > 0)
            place[0] -= 1
            by_budget[plan.budget_of_pair_P[place[1]]].append((-float(r.weights_TK[t, k].detach()), t, k))
        kept = torch.zeros(len(part), TOP_K, dtype=torch.bool)
        for budget, assignments in by_budget.items():
            for _, t, k in sorted(assignments)[: plan.for_rank(rank).kept_B[budget]]:
                kept[t, k] = True
        num_dropped += int((~kept).sum())
        weights = dict(moe.experts.named_parameters())
        out = torch.zeros_like(part)
        for t, k in kept.nonzero().tolist():
            expert = int(r.expert_ids_TK[t, k])
            gate, up = (weights["gate_up_proj"][expert] @ part[t] + weights["gate_up_proj_bias"][expert]).chunk(2)
            y = weights["down_proj"][expert] @ (torch.nn.functional.silu(gate) * up)
            out[t] += r.weights_TK[t, k] * (y + weights["down_proj_bias"][expert])
        outputs.append(out)
    return outputs, num_dropped


def run(factor: float, per: str) -> tuple[Tensor, int, list[int], dict[str, Tensor]]:
    """This rank's output under a random placement, all ranks' drops, the placement, and gradients of the squares."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    moe = build(factor, per)
    config = sml.SwiftMoEConfig(slots_per_rank=3, placement=models.RandomPolicy)
    engine = sml.SwiftMoEEngine(moe, config)
    reader = sml.LoadReader(moe)
    out = moe(tokens(world_size)[rank])
    out.square().sum().backward()
    load = reader.read()["experts"]
    gradients = {name: p.grad.full_tensor() for name, p in moe.experts.named_parameters()}  # type: ignore[union-attr]
    table = engine.placements["experts"].slot_to_expert_S.tolist()
    assert int(load.load_W.sum()) + load.num_dropped_tokens == TOKENS * TOP_K
    return out.detach(), load.num_dropped_tokens, table, gradients


@pytest.mark.parametrize("per", ["rank", "slot"])
@pytest.mark.parametrize(("world_size", "factor"), [(2, 0.6), (3, 1.0), (4, 0.8)])
def test_real_ranks_drop_what_the_emulation_drops(world_size: int, factor: float, per: str) -> None:
    outcomes = run_ranks(run, world_size, factor, per)
    moe = build(factor, per)
    placement = Placement(outcomes[0][2], EXPERTS, world_size)
    expected, num_dropped = emulate(moe, tokens(world_size), placement, factor, per)
    assert num_dropped > 0
    # DDP's mean over ranks.
    (sum(out.square().sum() for out in expected) / world_size).backward()  # type: ignore[union-attr]
    for (out, found_dropped, table, gradients), expected_out in zip(outcomes, expected, strict=True):
        assert table == outcomes[0][2]
        assert found_dropped == num_dropped
        torch.testing.assert_close(out, expected_out.detach(), rtol=1e-10, atol=1e-12)
        for name, parameter in moe.experts.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_one_rank_has_the_same_budgets() -> None:
    moe = build(0.5, "rank")
    reader = sml.LoadReader(moe)
    (x,) = tokens(1)[:1]
    out = moe(x)
    out.sum().backward()
    expected, num_dropped = emulate(moe, [x], Placement(np.arange(EXPERTS), EXPERTS, 1), 0.5, "rank")
    torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-12)
    assert reader.read()["experts"].num_dropped_tokens == num_dropped == TOKENS * TOP_K // 2


def test_a_dropped_assignment_adds_zero_and_gets_no_gradient() -> None:
    moe = build(0.1, "slot")
    x = tokens(1)[0].requires_grad_()
    out = moe(x)
    untouched = (out == 0).all(-1)
    assert untouched.any()
    out.sum().backward()
    assert x.grad is not None
    assert (x.grad[untouched] == 0).all()
    assert (x.grad[~untouched] != 0).any()
