from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml


def make(**options: Any) -> sml.MoE:
    torch.manual_seed(0)
    return sml.MoE(**{"dim": 6, "hidden_dim": 5, "num_experts": 4, "top_k": 2, **options})


X = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))


def by_hand(moe: sml.MoE, x: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    routed = moe.router(x.reshape(-1, x.shape[-1]))
    weights = dict(moe.experts.named_parameters())
    first = "gate_up_proj" if moe.experts.activation == "swiglu" else "up_proj"
    rows = []
    for token, ids, scores in zip(x.reshape(-1, x.shape[-1]), routed.expert_ids_TK, routed.weights_TK, strict=True):
        total = torch.zeros_like(token)
        for expert, score in zip(ids.tolist(), scores, strict=True):
            z = weights[first][expert] @ token
            if f"{first}_bias" in weights:
                z = z + weights[f"{first}_bias"][expert]
            if first == "gate_up_proj":
                gate, up = z.chunk(2)
                hidden = F.silu(gate) * up
            else:
                hidden = F.gelu(z) if moe.experts.activation == "gelu" else F.relu(z) ** 2
            y = weights["down_proj"][expert] @ hidden
            if "down_proj_bias" in weights:
                y = y + weights["down_proj_bias"][expert]
            total = total + score * y
        rows.append(total)
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_outputs_and_gradients_equal_a_loop_over_tokens(activation: str, bias: bool, top_k: int) -> None:
    moe = make(activation=activation, bias=bias, top_k=top_k).double()
    if bias:
        for name, parameter in moe.experts.named_parameters():
            if "bias" in name:
                nn.init.normal_(parameter)
    x = X.double().requires_grad_()
    parameters = [x, *moe.parameters()]
    actual, expected = moe(x), by_hand(moe, x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    probe = torch.randn(X.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad(out, parameters, probe) for out in (actual, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_any_leading_dims_none_and_no_tokens() -> None:
    moe = make()
    for shape in [(6,), (1, 6), (2, 3, 4, 6), (0, 6)]:
        assert moe(torch.randn(shape)).shape == shape


def test_shared_experts_see_every_token() -> None:
    moe, plain = make(num_shared_experts=2), make()
    plain.load_state_dict({k: v for k, v in moe.state_dict().items() if not k.startswith("shared")})
    assert moe.shared is not None
    assert moe.shared.up_proj.weight.shape == (2 * 2 * 5, 6)
    torch.testing.assert_close(moe(X), plain(X) + moe.shared(X))


def test_experts_take_hugging_faces_signature_and_ignore_foreign_ids() -> None:
    moe = make()
    x_TD = X.reshape(-1, 6)
    routed = moe.router(x_TD)
    experts = moe.experts
    out = experts(x_TD, routed.expert_ids_TK, routed.weights_TK)
    torch.testing.assert_close(out, moe(x_TD))
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "gate_up_proj": (4, 10, 6),
        "down_proj": (4, 6, 5),
    }
    foreign = routed.expert_ids_TK.clone()
    foreign[:, 1] = 4
    alone = experts(x_TD, routed.expert_ids_TK[:, :1], routed.weights_TK[:, :1])
    torch.testing.assert_close(experts(x_TD, foreign, routed.weights_TK), alone)


def test_auxiliary_loss_sums_the_blocks_and_is_zero_without_any() -> None:
    model = nn.Sequential(make(aux_loss_coef=0.5), make(z_loss_coef=0.1), make())
    model(X)
    losses = [loss for block in model for loss in block.router_losses.read()]
    assert len(losses) == 2
    torch.testing.assert_close(sml.auxiliary_loss(model), losses[0] + losses[1])
    assert float(sml.auxiliary_loss(nn.Linear(2, 2))) == 0
    with torch.no_grad():
        model.eval()(X)
    assert float(sml.auxiliary_loss(model)) == 0


def test_a_users_router_takes_the_place_of_ours() -> None:
    class First(nn.Module):
        """Every token to expert 3 alone."""

        def forward(self, x_TD: Tensor) -> sml.RouterOutput:
            ids = torch.full((len(x_TD), 1), 3)
            scores = torch.ones(len(x_TD), 4)
            return sml.RouterOutput(ids, torch.ones(len(x_TD), 1), scores, scores / 4)

    moe = make(router=First())
    gate, up = (X @ moe.experts.gate_up_proj[3].T).chunk(2, -1)
    torch.testing.assert_close(moe(X), (F.silu(gate) * up) @ moe.experts.down_proj[3].T)


def test_popularity_is_counted_once_a_trained_token_and_not_in_evaluation() -> None:
    moe = make()
    reader = sml.LoadReader(moe)
    with torch.no_grad():
        moe(X)
    assert reader.read() == {}
    x = X.clone().requires_grad_()
    for use_reentrant in (True, False):
        checkpoint(moe, x, use_reentrant=use_reentrant).sum().backward()
        load = reader.read()["experts"]
        assert load.num_assignments == 3 * 7 * 2
        expected = torch.bincount(moe.router(X.reshape(-1, 6)).expert_ids_TK.flatten(), minlength=4)
        assert load.popularity_E.tolist() == expected.tolist()
        assert (load.imbalance, load.token_survival_rate, load.num_moved) == (1.0, 1.0, 0)


def test_copies_and_pickles_are_modules_of_their_own() -> None:
    moe = make(aux_loss_coef=1.0)
    moe(X).sum().backward()
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        torch.testing.assert_close(other(X), moe(X))
        reader = sml.LoadReader(other)
        moe(X).sum().backward()
        assert reader.read() == {}


def test_same_seed_same_weights_and_a_scale_like_linears() -> None:
    a, b = make(hidden_dim=64), make(hidden_dim=64)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)
    for name, fan_in in (("gate_up_proj", 6), ("down_proj", 64)):
        weight = a.experts.get_parameter(name).detach()
        assert float(weight.abs().max()) <= fan_in**-0.5
        assert float(weight.std()) == pytest.approx((1 / 3 / fan_in) ** 0.5, rel=0.1)
        assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be a whole number of 1 or more, got 0"),
        ({"hidden_dim": 0}, "hidden_dim must be a whole number of 1 or more, got 0"),
        ({"hidden_dim": 2.5}, "hidden_dim must be a whole number of 1 or more, got 2.5"),
        ({"num_experts": 0}, "num_experts must be a whole number of 1 or more, got 0"),
        ({"top_k": 0}, "top_k must be in 1..num_experts=4, got 0"),
        ({"top_k": 5}, "top_k must be in 1..num_experts=4, got 5"),
        ({"activation": "tanh"}, "activation must be one of 'swiglu', 'gelu', 'relu2', got 'tanh'"),
        ({"capacity_per": "expert"}, "capacity_per must be one of 'rank', 'slot', got 'expert'"),
        ({"capacity_factor": 0.0}, "capacity_factor must be a number above 0, got 0.0"),
        ({"capacity_factor": -1}, "capacity_factor must be a number above 0, got -1"),
        ({"num_shared_experts": -1}, "num_shared_experts must be a whole number of 0 or more, got -1"),
        ({"aux_loss_coef": -0.1}, "aux_loss_coef must be a number of 0 or more, got -0.1"),
        ({"z_loss_coef": float("nan")}, "z_loss_coef must be a number of 0 or more, got nan"),
    ],
)
def test_options_out_of_range_are_refused_with_what_came_and_what_was_needed(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_an_input_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"MoE\(dim=6\) got an input of shape \[2, 5\]: its last dim must be dim"):
        make()(torch.zeros(2, 5))
    ids, weights = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(ValueError, match=r"Experts take \[tokens, dim=6\], got \[2, 5\].*with dim=5"):
        make().experts(torch.zeros(2, 5), ids, weights)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_scores_are_refused(poison: float) -> None:
    x = X.clone()
    x[1, 2, 3] = poison
    with pytest.raises(FloatingPointError, match="non-finite scores.*lower the learning rate, clip gradients"):
        make()(x)


def test_another_shape_in_a_state_dict_is_refused_naming_the_key() -> None:
    with pytest.raises(
        RuntimeError, match=r"'experts.down_proj' has shape \[4, 6, 9\] in the checkpoint, and \[4, 6, 5\]"
    ):
        make().load_state_dict(make(hidden_dim=9).state_dict())
