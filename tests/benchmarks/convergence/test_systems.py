"""Which assignments each system keeps, by literals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.convergence.systems import SYSTEMS, keep_as_deepspeed, keep_within_budgets, weigh_as_deepspeed
from swiftmoe_lightning.placement import Placement

# Two ranks of two slots, four experts.
PLACEMENT = Placement(np.arange(4), 4, 2)


def test_deepspeed_keeps_the_largest_draws_of_each_rank_and_expert() -> None:
    # Rank 0 sends six of eight tokens to expert 1; its capacity there is the minimum, 4.
    ids_WTK = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 3], [0, 0, 1, 1, 2, 2, 3, 3]]).unsqueeze(2)
    random_WTE = torch.zeros(2, 8, 4)
    random_WTE[0, :, 1] = torch.tensor([0.9, 0.1, 0.8, 1.0, 0.7, 0.2, 0.6, 1.0])
    kept_WTK, load = keep_as_deepspeed(ids_WTK, PLACEMENT, 1.0, random_WTE)
    assert kept_WTK[0, :, 0].tolist() == [True, False, True, True, True, False, True, True]
    assert kept_WTK[1].all()
    assert load.counts_WE.tolist() == [[1, 6, 0, 1], [2, 2, 2, 2]]
    assert load.wanted_W.tolist() == [11, 5]
    assert load.load_W.tolist() == [9, 5]


def test_deepspeed_keeps_first_choices_before_second_ones_in_the_order_of_the_tokens() -> None:
    ids_WTK = torch.tensor([[[1, 0], [0, 1], [1, 0], [0, 1], [1, 0], [0, 1], [1, 2]]])
    placement = Placement(np.arange(4), 4, 1)
    kept_WTK, _ = keep_as_deepspeed(ids_WTK, placement, 1.0, torch.rand(1, 7, 4))
    # A capacity of ceil(14 / 4) = 4: expert 1 is full after its four first choices, expert 0 takes one second choice.
    assert kept_WTK[0, :, 0].all()
    assert kept_WTK[0, :, 1].tolist() == [True, False, False, False, False, False, True]


def test_deepspeed_with_more_choices_is_refused() -> None:
    ids_WTK = torch.arange(4).repeat(2, 4, 1)[..., :3]
    with pytest.raises(ValueError, match="emulated for top-1 and top-2, got top-3"):
        keep_as_deepspeed(ids_WTK, PLACEMENT, 1.0, torch.rand(2, 4, 4))


def test_deepspeeds_kept_weights_of_a_token_sum_to_one() -> None:
    weights_TK = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.9, 0.1]])
    kept_TK = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
    expected_TK = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    torch.testing.assert_close(weigh_as_deepspeed(weights_TK, kept_TK), expected_TK)
    one_TK = weigh_as_deepspeed(weights_TK[:, :1], kept_TK[:, :1])
    torch.testing.assert_close(one_TK, torch.tensor([[0.6], [0.7], [0.0], [0.0]]))


def top2gating(logits_TE: Tensor, capacity: int) -> Tensor:
    """[T, E] the weight of each expert for each token, by the formulas of DeepSpeed's top-2 gate without sampling."""
    gates_TE = logits_TE.softmax(1)
    first_TE = F.one_hot(gates_TE.argmax(1), gates_TE.shape[1])
    second_TE = F.one_hot(gates_TE.masked_fill(first_TE.bool(), -1).argmax(1), gates_TE.shape[1])
    place_first_TE = first_TE.cumsum(0) - 1
    place_second_TE = second_TE.cumsum(0) - 1 + first_TE.sum(0)
    first_TE, second_TE = first_TE * (place_first_TE < capacity), second_TE * (place_second_TE < capacity)
    gate_first_T, gate_second_T = (gates_TE * first_TE).sum(1), (gates_TE * second_TE).sum(1)
    sum_T = (gate_first_T + gate_second_T).clamp(min=torch.finfo(torch.float32).eps)
    return (gate_first_T / sum_T).unsqueeze(1) * first_TE + (gate_second_T / sum_T).unsqueeze(1) * second_TE


def test_deepspeed_with_two_choices_is_its_formula_with_its_gradient() -> None:
    # Expert 0 is popular, so that tokens lose one choice, the other, or both.
    logits_TE = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.5, 1.0, 0.0, 0.0])
    logits_TE.requires_grad_()
    gates_TK, ids_TK = logits_TE.softmax(1).topk(2)
    kept_WTK, _ = keep_as_deepspeed(ids_TK.unsqueeze(0), Placement(np.arange(4), 4, 1), 0.5, torch.rand(1, 24, 4))
    kept_TK = kept_WTK[0]
    assert {tuple(kept) for kept in kept_TK.tolist()} == {(True, True), (True, False), (False, True), (False, False)}
    weights_TK = weigh_as_deepspeed(gates_TK / gates_TK.sum(1, keepdim=True), kept_TK)
    ours_TE = torch.zeros(24, 4).scatter(1, ids_TK, weights_TK)
    # ceil(24 * 2 / 4 * 0.5)
    theirs_TE = top2gating(logits_TE, capacity=6)
    torch.testing.assert_close(ours_TE, theirs_TE)
    factor_TE = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
    (ours,), (theirs,) = (torch.autograd.grad((out * factor_TE).sum(), logits_TE) for out in (ours_TE, theirs_TE))
    torch.testing.assert_close(ours, theirs)


def test_the_lowest_scores_over_a_budget_are_dropped() -> None:
    ids_WTK = torch.tensor([[[0], [0], [0], [3]], [[0], [0], [2], [3]]])
    scores_WTK = torch.tensor([[[0.9], [0.2], [0.8], [0.1]], [[0.3], [0.7], [0.1], [0.1]]])
    # A slot's budget is 8 / 4 = 2: of expert 0's five assignments two are kept, one of each rank.
    kept_WTK, load = keep_within_budgets(ids_WTK, scores_WTK, PLACEMENT, SYSTEMS["static"].candidate, 1.0)
    assert kept_WTK.squeeze(2).tolist() == [[True, False, False, True], [False, True, True, True]]
    assert load.num_dropped_tokens == 3


def test_without_a_capacity_everything_is_kept() -> None:
    ids_WTK = torch.zeros(2, 4, 1, dtype=torch.int64)
    kept_WTK, load = keep_within_budgets(ids_WTK, torch.ones(2, 4, 1), PLACEMENT, SYSTEMS["balanced"].candidate, None)
    assert kept_WTK.all()
    assert load.load_W.tolist() == [8, 0]
