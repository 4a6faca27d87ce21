from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swiftmoe_lightning as sml
from swiftmoe_lightning.modules.router import load_balancing_loss, z_loss


def router(**options: Any) -> sml.TopKRouter:
    torch.manual_seed(0)
    made = sml.TopKRouter(4, 6, options.pop("top_k", 2), **options)
    torch.nn.init.normal_(made.weight)
    return made


X_TD = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))


def test_it_picks_the_k_best_scores_and_renormalizes_them() -> None:
    made = router()
    out = made(X_TD)
    for x, ids, weights in zip(X_TD, out.expert_ids_TK.tolist(), out.weights_TK, strict=True):
        scores = torch.softmax(made.weight @ x, 0)
        order = sorted(range(6), key=lambda e: -float(scores[e].detach()))
        assert ids == order[:2]
        torch.testing.assert_close(weights, scores[ids] / scores[ids].sum())


def test_without_renormalizing_weights_are_the_scores() -> None:
    out = router(renormalize=False)(X_TD)
    torch.testing.assert_close(out.weights_TK, out.logits_TE.softmax(1).gather(1, out.expert_ids_TK))
    assert (out.weights_TK.sum(1) < 1).all()


def test_top_1_keeps_its_score_so_that_the_router_learns_from_the_task() -> None:
    made = router(top_k=1)
    out = made(X_TD)
    out.weights_TK.sum().backward()
    assert made.weight.grad is not None
    assert made.weight.grad.abs().sum() > 0


def test_sigmoid_scores_are_each_experts_own_and_shares_sum_to_one() -> None:
    made = router(score="sigmoid", renormalize=False)
    out = made(X_TD)
    scores_TE = torch.sigmoid(F.linear(X_TD, made.weight))
    torch.testing.assert_close(out.weights_TK, scores_TE.topk(2).values)
    torch.testing.assert_close(out.prob_sums_E, (scores_TE / scores_TE.sum(1, keepdim=True)).sum(0))


def test_scores_are_computed_in_float32_whatever_the_input() -> None:
    made = router()
    with torch.autocast("cpu", torch.bfloat16):
        out = made(X_TD.bfloat16())
    assert out.logits_TE.dtype == out.weights_TK.dtype == torch.float32
    torch.testing.assert_close(out.logits_TE, F.linear(X_TD.bfloat16().float(), made.weight))


def test_the_bias_moves_towards_cold_experts_and_changes_the_chosen_experts_but_not_the_weights() -> None:
    made = router(score="sigmoid", bias_update_rate=0.5, renormalize=False)
    made.update_bias(np.array([10, 0, 5, 5, 5, 5]))
    assert made.expert_bias is not None
    assert made.expert_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0]
    made.expert_bias[1] = 100.0
    out = made(X_TD)
    assert (out.expert_ids_TK == 1).any(1).all()
    torch.testing.assert_close(out.weights_TK, torch.sigmoid(out.logits_TE).gather(1, out.expert_ids_TK))
    assert "expert_bias" in made.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, r"top_k must be in 1..num_experts=6, got 0"),
        ({"top_k": True}, r"top_k must be in 1..num_experts=6, got True"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate must be a number of 0 or more, got nan"),
        ({"bias_update_rate": float("inf")}, "bias_update_rate must be a number of 0 or more, got inf"),
        ({"bias_update_rate": -1}, "bias_update_rate must be a number of 0 or more, got -1"),
        ({"bias_update_rate": "0.1"}, "bias_update_rate must be a number of 0 or more, got '0.1'"),
        ({"top_k": 7}, r"top_k must be in 1..num_experts=6, got 7"),
        ({"top_k": 1, "renormalize": True}, "renormalize=True with top_k=1 makes every weight 1"),
        ({"score": "relu"}, "score must be one of 'softmax', 'sigmoid', got 'relu'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(**options)


def switch_loss(probs_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """Switch's equation 4, by hand: E * sum over experts of token share times mean score."""
    total = probs_TE.new_zeros(())
    for expert in range(probs_TE.shape[1]):
        share = (ids_TK == expert).sum() / ids_TK.numel()
        total = total + share * probs_TE[:, expert].mean()
    return total * probs_TE.shape[1]


def test_losses_of_ranks_average_to_the_loss_of_the_whole_batch() -> None:
    out = router()(X_TD)
    popularity_E = torch.bincount(out.expert_ids_TK.flatten(), minlength=6)
    parts = [slice(0, 13), slice(13, 50)]
    balance = [router()(X_TD[part]).load_balancing_loss(popularity_E, 2) for part in parts]
    torch.testing.assert_close(torch.stack(balance).mean(), switch_loss(out.logits_TE.softmax(1), out.expert_ids_TK))
    stability = [z_loss(out.logits_TE[part], torch.tensor(50.0), 2) for part in parts]
    torch.testing.assert_close(torch.stack(stability).mean(), out.logits_TE.logsumexp(1).square().mean())


def test_the_balancing_loss_is_1_when_balanced_and_e_when_all_choose_one() -> None:
    uniform = torch.full((12, 4), 0.25)
    assert float(load_balancing_loss(uniform, torch.tensor([3, 3, 3, 3]), 1, 1)) == pytest.approx(1)
    one_hot = torch.eye(4)[torch.zeros(12, dtype=torch.int64)]
    assert float(load_balancing_loss(one_hot, torch.tensor([12, 0, 0, 0]), 1, 1)) == pytest.approx(4)


def test_a_bias_that_nobody_updates_says_so_once(recwarn: pytest.WarningsRecorder) -> None:
    made = router(bias_update_rate=0.1)
    warnings.simplefilter("always")
    with torch.no_grad():
        for _ in range(1100):
            made(X_TD[:1])
    made.eval()
    for _ in range(1100):
        made(X_TD[:1])
    assert not recwarn.list
    made.train()
    for _ in range(2100):
        made(X_TD[:1])
    (warned,) = recwarn.list
    message = "TopKRouter(bias_update_rate=0.1) has trained for 1000 forwards, and nobody has updated its bias"
    assert str(warned.message).startswith(message)


def test_a_bias_that_was_updated_and_a_router_without_one_are_silent() -> None:
    # Warnings are errors.
    updated, without = router(bias_update_rate=0.1), router()
    updated(X_TD)
    updated.update_bias(np.ones(6))
    for _ in range(1100):
        updated(X_TD[:1])
        without(X_TD[:1])
    assert updated.expert_bias is not None
    assert updated.expert_bias.tolist() == [0.0] * 6
