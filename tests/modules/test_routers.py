"""Each router chooses as its paper, or the published code, does. T tokens, E experts, K top-k."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.materialize import materialize_dense
from swiftmoe_lightning.modules.sinkhorn_router import sinkhorn

DIM, EXPERTS, VOCAB = 16, 12, 20
GROUPS = {"num_groups": 4, "top_k_groups": 2}
X_TD = torch.randn(50, DIM, generator=torch.Generator().manual_seed(1))
IDS_T = torch.randint(VOCAB, (50,), generator=torch.Generator().manual_seed(2))

CLUSTERS_T = torch.randint(4, (50,), generator=torch.Generator().manual_seed(3))

MAKE: dict[str, Callable[..., sml.TopKRouter]] = {
    "top-k": sml.TopKRouter,
    "group-limited": partial(sml.GroupLimitedRouter, **GROUPS),
    "jitter": partial(sml.JitterRouter, jitter=0.3),
    "noisy": sml.NoisyTopKRouter,
    "sinkhorn": sml.SinkhornRouter,
    "hash": partial(sml.HashRouter, vocab_size=VOCAB),
    "clustered": partial(sml.ClusteredRouter, num_groups=4),
    "expert choice": sml.ExpertChoiceRouter,
}


def made(name: str, top_k: int = 3, **options: Any) -> sml.TopKRouter:
    torch.manual_seed(0)
    router = MAKE[name](DIM, EXPERTS, top_k, **options)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.3)
    return router


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scores_per_group", [1, 2])
def test_group_limited_chooses_the_best_groups_then_the_best_experts_in_them(score: str, scores_per_group: int) -> None:
    router = made("group-limited", score=score, scores_per_group=scores_per_group, bias_update_rate=0.1)
    assert router.expert_bias is not None
    router.expert_bias.copy_(torch.linspace(-0.4, 0.2, EXPERTS))
    out = router(X_TD)
    scores_TE = out.logits_TE.softmax(-1) if score == "softmax" else out.logits_TE.sigmoid()
    choice_TE = (scores_TE + router.expert_bias).detach().numpy()
    for scores_E, ids_K in zip(choice_TE, out.expert_ids_TK.tolist(), strict=True):
        groups_GE = scores_E.reshape(4, 3)
        best_groups = np.sort(groups_GE, axis=1)[:, -scores_per_group:].sum(1).argsort()[-2:]
        allowed = [e for e in range(EXPERTS) if e // 3 in best_groups]
        assert sorted(ids_K) == sorted(sorted(allowed, key=lambda e: scores_E[e])[-3:])
    chosen_TK = scores_TE.gather(1, out.expert_ids_TK)
    torch.testing.assert_close(out.weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))


def test_group_limited_is_deepseek_v3s_and_v2s_router_to_the_bit() -> None:
    pytest.importorskip("transformers", minversion="5.24")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    sizes = {"num_experts_per_tok": 8, "num_local_experts": 64, "hidden_size": DIM, "n_group": 8, "topk_group": 4}
    ours = sml.GroupLimitedRouter(
        DIM, 64, 8, num_groups=8, top_k_groups=4, scaling_factor=2.5, score="sigmoid", bias_update_rate=1e-3
    )
    nn.init.normal_(ours.weight)
    assert ours.expert_bias is not None
    nn.init.normal_(ours.expert_bias, std=0.3)
    theirs = DeepseekV3TopkRouter(SimpleNamespace(**sizes, norm_topk_prob=True, routed_scaling_factor=2.5))
    theirs.load_state_dict({"weight": ours.weight, "e_score_correction_bias": ours.expert_bias})
    x_TD = torch.randn(1000, DIM)
    out, (logits_TE, weights_TK, ids_TK) = ours(x_TD), theirs(x_TD)
    for actual, expected in ((out.logits_TE, logits_TE), (out.expert_ids_TK, ids_TK), (out.weights_TK, weights_TK)):
        assert torch.equal(actual, expected)

    options = {"scores_per_group": 1, "scaling_factor": 16.0, "renormalize": False}
    ours = sml.GroupLimitedRouter(DIM, 64, 8, num_groups=8, top_k_groups=4, **options)
    nn.init.normal_(ours.weight)
    config = SimpleNamespace(**sizes, num_experts=64, topk_method="group_limited_greedy", routed_scaling_factor=16.0)
    theirs = DeepseekV2TopkRouter(config)
    theirs.load_state_dict({"weight": ours.weight})
    out, (_, weights_TK, ids_TK) = ours(x_TD), theirs(x_TD)
    # V2 fills with another number, so that the order may be another one.
    ours_TE = torch.zeros(1000, 64).scatter(1, out.expert_ids_TK, out.weights_TK)
    assert torch.equal(ours_TE, torch.zeros(1000, 64).scatter(1, ids_TK, weights_TK))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5}, "num_groups must divide num_experts=12, got 5"),
        ({"num_groups": 0}, "num_groups must be a whole number of 1 or more, got 0"),
        ({"top_k_groups": 5}, "top_k_groups must be in 1..num_groups=4, got 5"),
        ({"scores_per_group": 4}, "scores_per_group must be in 1..3, a group's experts, got 4"),
        (
            {"top_k_groups": 1, "top_k": 4},
            "1 groups of 3 experts hold 3, but top_k is 4. Choose top_k_groups=2",
        ),
        ({"scaling_factor": -1.0}, "scaling_factor must be a number of 0 or more, got -1.0"),
    ],
)
def test_groups_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("group-limited", **options)


def test_other_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="jitter must be a number of 0 or more, got nan"):
        made("jitter", jitter=float("nan"))
    with pytest.raises(ValueError, match="vocab_size must be a whole number of 1 or more, got 0"):
        made("hash", vocab_size=0)


def test_noise_is_that_of_the_papers_and_in_training_alone() -> None:
    jitter, noisy = made("jitter"), made("noisy")
    torch.manual_seed(3)
    noise_TD = torch.rand(50, DIM) * 0.6 + 0.7
    torch.manual_seed(3)
    torch.testing.assert_close(jitter(X_TD).logits_TE, F.linear(X_TD * noise_TD, jitter.weight))
    torch.manual_seed(4)
    width_TE = F.softplus(F.linear(X_TD, noisy.noise.weight))
    expected_TE = F.linear(X_TD, noisy.weight) + torch.randn(50, EXPERTS) * width_TE
    torch.manual_seed(4)
    out = noisy(X_TD)
    torch.testing.assert_close(out.logits_TE, expected_TE)
    # The choice and the weights are of the noisy scores: a softmax over the best K, equation 3.
    best = expected_TE.topk(3)
    assert torch.equal(out.expert_ids_TK, best.indices)
    torch.testing.assert_close(out.weights_TK, best.values.softmax(-1))
    (gradient,) = torch.autograd.grad(out.weights_TK[:, 0].sum(), noisy.noise.weight)
    assert gradient.abs().sum() > 0
    assert not sml.NoisyTopKRouter(DIM, EXPERTS, 2).noise.weight.any()


@pytest.mark.parametrize(
    "name", [name for name in MAKE if name not in ("hash", "expert choice", "group-limited", "clustered")]
)
def test_evaluation_is_plain_top_k_and_draws_nothing(name: str) -> None:
    router = made(name).eval()
    plain = made("top-k")
    plain.weight = router.weight
    state = torch.get_rng_state()
    actual, expected = router(X_TD), plain(X_TD)
    assert torch.equal(actual.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(actual.weights_TK, expected.weights_TK)
    assert torch.equal(torch.get_rng_state(), state)


class Model(nn.Module):
    """A linear layer, then a block with the router, run by `run`."""

    def __init__(self, name: str) -> None:
        super().__init__()
        router = made(name)
        self.inner = nn.Linear(DIM, DIM)
        self.moe = sml.MoE(DIM, 5, EXPERTS, 3, router=router, aux_loss_coef=0.5, z_loss_coef=0.1)

    def forward(self, run: Callable[..., Tensor]) -> Tensor:
        return run(self.moe, self.inner(X_TD), torch.arange(50) % 7 > 0, IDS_T, CLUSTERS_T)


@pytest.mark.parametrize("name", MAKE)
def test_checkpointing_routes_alike_in_both_runs(name: str) -> None:
    gradients = []
    for run in (
        lambda block, *inputs: block(*inputs),
        partial(checkpoint, use_reentrant=True),
        partial(checkpoint, use_reentrant=False),
    ):
        model = Model(name)
        torch.manual_seed(5)
        (model(run).square().sum() + sml.auxiliary_loss(model)).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(gradient is not None for gradient in gradients[-1])
    for again in gradients[1:]:
        for actual, expected in zip(again, gradients[0], strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", MAKE)
def test_no_tokens_and_other_dtypes_go_through_every_router(name: str) -> None:
    moe = sml.MoE(DIM, 5, EXPERTS, 3, router=made(name), aux_loss_coef=0.1, z_loss_coef=0.1)
    assert moe(X_TD[:0], token_ids=IDS_T[:0], cluster_ids=CLUSTERS_T[:0]).shape == (0, DIM)
    assert float(sml.auxiliary_loss(moe).detach()) == 0
    routed = moe.bfloat16().router(X_TD.bfloat16(), IDS_T, CLUSTERS_T)
    assert routed.logits_TE.dtype == routed.weights_TK.dtype == torch.float32
    with pytest.raises(FloatingPointError, match="non-finite scores"):
        moe(torch.full((4, DIM), float("nan"), dtype=torch.bfloat16), None, IDS_T[:4], CLUSTERS_T[:4])


def megatrons_sinkhorn(logits_TE: np.ndarray) -> np.ndarray:
    """Its formula and its tolerance."""
    cost_TE = np.exp(logits_TE)
    num_tokens, num_experts = cost_TE.shape
    d1_E, error = np.ones(num_experts), np.inf
    while error > 1e-4:
        d0_T = 1 / num_tokens / ((d1_E * cost_TE).sum(1) + 1e-8)
        new_E = 1 / num_experts / ((d0_T[:, None] * cost_TE).sum(0) + 1e-8)
        d1_E, error = new_E, np.abs(new_E - d1_E).mean()
    return d1_E * cost_TE * d0_T[:, None]


def test_sinkhorn_is_megatrons_and_evens_skewed_scores() -> None:
    router = made("sinkhorn", top_k=2, score="sigmoid", renormalize=False)
    with torch.no_grad():
        router.weight[0] += 0.3 * X_TD.mean(0).sign()
    x_TD = X_TD + 2 * X_TD.mean(0)
    out = router(x_TD)
    logits_TE = out.logits_TE.detach()
    expected_TE = megatrons_sinkhorn(logits_TE.double().numpy())
    np.testing.assert_allclose(sinkhorn(logits_TE.double()).numpy(), expected_TE, rtol=1e-5)
    assert torch.equal(out.expert_ids_TK, torch.from_numpy(expected_TE).topk(2).indices)
    torch.testing.assert_close(out.weights_TK, out.logits_TE.sigmoid().gather(1, out.expert_ids_TK))
    loads = [torch.bincount(r.expert_ids_TK.flatten(), minlength=EXPERTS) for r in (out, router.eval()(x_TD))]
    assert loads[0].max() < 0.75 * loads[1].max()
    # What exp alone would make inf, and columns whose factors never settle.
    extreme_TE = sinkhorn(torch.cat([200 * logits_TE, logits_TE - 1e4 * torch.arange(EXPERTS)]))
    assert extreme_TE.isfinite().all()


def test_hash_is_deepseek_v4s_router_and_its_table_is_that_of_its_seed() -> None:
    router = made("hash", score="sigmoid")
    table_VK = router.table.expert_ids_VK
    assert all(len(set(ids)) == 3 and set(ids) <= set(range(EXPERTS)) for ids in table_VK.tolist())
    assert torch.equal(made("hash").table.expert_ids_VK, table_VK)
    assert not torch.equal(made("hash", seed=1).table.expert_ids_VK, table_VK)
    out = router(X_TD, IDS_T)
    assert torch.equal(out.expert_ids_TK, table_VK[IDS_T])
    scores_TK = torch.sigmoid(F.linear(X_TD, router.weight)).gather(1, table_VK[IDS_T])
    torch.testing.assert_close(out.weights_TK, scores_TK / scores_TK.sum(1, keepdim=True))
    late = made("hash", device="meta")
    materialize_dense(late, torch.device("cpu"))
    assert torch.equal(late.table.expert_ids_VK, table_VK)
    with pytest.raises(ValueError, match=r"chooses by token ids, and got none. Call moe\(x, token_ids=ids\)"):
        sml.MoE(DIM, 5, EXPERTS, router=router)(X_TD)

    transformers = pytest.importorskip("transformers", minversion="5.24")
    theirs = transformers.models.deepseek_v4.modeling_deepseek_v4.DeepseekV4HashRouter(
        SimpleNamespace(
            num_experts_per_tok=3,
            num_local_experts=EXPERTS,
            hidden_size=DIM,
            scoring_func="sigmoid",
            routed_scaling_factor=1.0,
            vocab_size=VOCAB,
        )
    )
    theirs.load_state_dict({"weight": router.weight, "tid2eid": table_VK})
    _, weights_TK, ids_TK = theirs(X_TD, IDS_T)
    assert torch.equal(out.expert_ids_TK, ids_TK)
    assert torch.equal(out.weights_TK, weights_TK)


@pytest.mark.parametrize("num_tokens", [1, 7, 50])
def test_in_expert_choice_each_expert_takes_its_best_tokens(num_tokens: int) -> None:
    moe = sml.MoE(DIM, 5, EXPERTS, 3, router=made("expert choice"), aux_loss_coef=1.0).double()
    x_TD = X_TD[:num_tokens].double()
    scores_TE = F.linear(x_TD, moe.router.weight).softmax(-1)
    capacity = -(-num_tokens * 3 // EXPERTS)
    expected_TD = torch.zeros_like(x_TD)
    gate_up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    for expert in range(EXPERTS):
        for token in scores_TE[:, expert].argsort(descending=True)[:capacity]:
            gate, up = (gate_up[expert] @ x_TD[token]).chunk(2)
            row = scores_TE[token, expert] * (down[expert] @ (F.silu(gate) * up))
            expected_TD = expected_TD.index_add(0, token.view(1), row.unsqueeze(0))
    reader = sml.LoadReader(moe)
    out_TD = moe(x_TD)
    parameters = [moe.router.weight, gate_up, down]
    gradients = [torch.autograd.grad(out.square().sum(), parameters) for out in (out_TD, expected_TD)]
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-12, atol=1e-14)
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-14)
    assert reader.read()["experts"].popularity_E.tolist() == [capacity] * EXPERTS
    # Even load: the loss is 1, whatever the scores are.
    assert float(sml.auxiliary_loss(moe).detach()) == pytest.approx(1)


@pytest.mark.parametrize("name", MAKE)
def test_the_z_loss_is_a_mean_over_tokens(name: str) -> None:
    moe = sml.MoE(DIM, 5, EXPERTS, 3, router=made(name).eval(), z_loss_coef=1.0)
    moe(X_TD, token_ids=IDS_T, cluster_ids=CLUSTERS_T)
    logits_TE = F.linear(X_TD, moe.router.weight)
    if name == "clustered":
        logits_TE = logits_TE.unflatten(1, (4, 3))[torch.arange(50), CLUSTERS_T]
    expected = logits_TE.logsumexp(-1).square().mean()
    torch.testing.assert_close(sml.auxiliary_loss(moe), expected)
