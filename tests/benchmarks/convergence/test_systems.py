"""Which assignments each system keeps, by literals."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.convergence.systems import SYSTEMS, keep_as_deepspeed, keep_within_budgets
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
