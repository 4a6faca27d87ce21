import pytest
import torch

from swiftmoe_lightning.ops import backend, route, route_to
from tests.ops.cases import DEVICE, assert_close, assert_triton_equals_eager, gradients

SCORES = ["softmax", "sigmoid"]


def logits(num_tokens, num_experts, dtype=torch.float32):
    """Distinct in each row, so that the best K are the same everywhere."""
    generator = torch.Generator().manual_seed(num_tokens + num_experts)
    order_TE = torch.rand(num_tokens, num_experts, generator=generator, device="cpu").argsort(dim=-1)
    return ((order_TE - num_experts / 2) * (6 / num_experts)).to(DEVICE, dtype)


def route_by_autograd(logits_TE, bias_E, top_k, score, renormalize):
    """(ids, weights, sums of shares, sum of squares), written plainly, with autograd's gradients."""
    scores_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
    ids_TK = biased_TE.topk(top_k, dim=-1).indices
    weights_TK = scores_TE.gather(-1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=1e-20)
    probs_TE = scores_TE
    if score == "sigmoid":
        probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    return ids_TK, weights_TK, probs_TE.sum(0), logits_TE.logsumexp(-1).square().sum()


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_route_equals_autograd_in_values_and_gradients(score, renormalize, with_bias):
    num_experts, top_k = 8, 3
    bias_E = torch.linspace(-1, 1, num_experts) if with_bias else None
    # The last token's sigmoids sum to less than what a sum at least is, where it divides.
    x_TE = torch.cat([logits(6, num_experts), torch.linspace(-47, -54, num_experts).unsqueeze(0)]).requires_grad_()

    def run():
        routed = route(x_TE, bias_E, top_k, score, renormalize)
        return (routed.weights_TK, routed.prob_sums_E, routed.square_sum), routed

    ids_TK, *_ = route_by_autograd(x_TE, bias_E, top_k, score, renormalize)
    _, routed = run()
    assert torch.equal(routed.expert_ids_TK, ids_TK)
    for output in range(3):
        actual, expected = run()[0][output], route_by_autograd(x_TE, bias_E, top_k, score, renormalize)[1 + output]
        assert_close(actual, expected)
        assert_close(gradients(actual, {"x": x_TE})["x"], gradients(expected, {"x": x_TE})["x"])


# T tokens, E experts, K top-k; more than one block of tokens in the last.
@pytest.mark.parametrize("sizes", [(0, 4, 2), (1, 1, 1), (7, 3, 3), (7, 64, 4), (70, 33, 2)], ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_tritons_route_equals_the_eager_one(sizes, score, renormalize):
    num_tokens, num_experts, top_k = sizes
    values = {"logits": logits(num_tokens, num_experts)}
    assert_triton_equals_eager(route, values, None, top_k, score, renormalize)
    bias_E = torch.linspace(-0.2, 0.3, num_experts)
    assert_triton_equals_eager(route, values, bias_E, top_k, score, renormalize)


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("score", SCORES)
def test_experts_that_were_chosen_before_take_the_place_of_the_best(score):
    x_TE = logits(70, 33).requires_grad_()
    live = route(x_TE, None, 2, score, True)
    chosen_TK = (live.expert_ids_TK + 1) % 33
    chosen_TK[::3] = -1
    weights_TK, ids_TK, *_ = torch.ops.swiftmoe.route(x_TE, None, 2, score, True, chosen_TK)
    assert torch.equal(ids_TK, torch.where(chosen_TK < 0, live.expert_ids_TK, chosen_TK))
    raw_TK = (x_TE.softmax(-1) if score == "softmax" else x_TE.sigmoid()).gather(-1, ids_TK)
    expected_TK = raw_TK / raw_TK.sum(-1, keepdim=True)
    assert_close(weights_TK, expected_TK)
    assert_close(gradients(weights_TK, {"x": x_TE})["x"], gradients(expected_TK, {"x": x_TE})["x"])
    again_TK, *_ = torch.ops.swiftmoe.route(x_TE, None, 2, score, True, live.expert_ids_TK)
    assert torch.equal(again_TK, live.weights_TK)


def test_gradients_pass_gradcheck():
    x_TE = logits(3, 5, torch.float64).requires_grad_()
    for score in SCORES:
        for renormalize in (False, True):
            assert torch.autograd.gradcheck(lambda x, s=score, r=renormalize: _trained(route(x, None, 2, s, r)), x_TE)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_route_to_the_experts_that_route_chooses_is_the_same(score, renormalize):
    x_TE = logits(7, 8, torch.float64).requires_grad_()
    ids_TK = route(x_TE, None, 3, score, renormalize).expert_ids_TK
    for output in range(3):
        actual = _trained(route_to(x_TE, ids_TK, score, renormalize))[output]
        expected = _trained(route(x_TE, None, 3, score, renormalize))[output]
        assert_close(actual, expected)
        assert_close(gradients(actual, {"x": x_TE})["x"], gradients(expected, {"x": x_TE})["x"])


def _trained(routed):
    return routed.weights_TK, routed.prob_sums_E, routed.square_sum


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("score", SCORES)
def test_scores_that_are_all_zero_give_zero_weights_and_finite_gradients(score):
    x_TE = torch.full((3, 4), -300.0, requires_grad=True)
    routed = route(x_TE, None, 2, score, True)
    assert torch.equal(routed.weights_TK, torch.full((3, 2), 0.5 if score == "softmax" else 0.0))
    sum(out.sum() for out in _trained(routed)).backward()
    assert x_TE.grad.isfinite().all()


@pytest.mark.usefixtures("each_backend")
def test_experts_of_minus_infinite_logits_are_chosen_last():
    x_TE = torch.tensor([[0.5, -float("inf"), 1.0, -float("inf")]], requires_grad=True)
    routed = route(x_TE, None, 2, "softmax", True)
    assert routed.expert_ids_TK.tolist() == [[2, 0]]
    sum(out.sum() for out in _trained(routed)).backward()
    assert x_TE.grad.isfinite().all()


def test_of_equal_scores_triton_takes_the_lower_expert():
    pytest.importorskip("triton")
    with backend.force_backend("triton"), torch.device(DEVICE):
        assert route(torch.zeros(2, 5), None, 3, "softmax", True).expert_ids_TK.tolist() == [[0, 1, 2]] * 2
        bias_E = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0])
        assert route(torch.zeros(1, 5), bias_E, 3, "sigmoid", True).expert_ids_TK.tolist() == [[2, 4, 0]]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poisoned_logits_choose_experts_that_exist(poison):
    x_TE = torch.full((2, 5), poison)
    x_TE[1] = torch.arange(5.0)
    routed = route(x_TE, None, 2, "softmax", True)
    assert ((routed.expert_ids_TK >= 0) & (routed.expert_ids_TK < 5)).all()
    assert routed.expert_ids_TK[1].tolist() == [4, 3]
    assert routed.weights_TK[1].isfinite().all()


def test_what_route_cannot_take_is_refused():
    with pytest.raises(ValueError, match="score must be one of .*softmax.* got 'tanh'"):
        route(torch.zeros(2, 5), None, 2, "tanh", True)
    with pytest.raises(ValueError, match=r"top_k must be in 1..num_experts=5, got 6"):
        route(torch.zeros(2, 5), None, 6, "softmax", True)
