"""Clustered routing is a small mixture of experts for each cluster. T tokens, E experts, K top-k."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import swiftmoe_lightning as sml

DIM, EXPERTS, TOP_K, GROUPS = 6, 12, 2, 3
# The sequences of a cluster have different lengths; one is all padding.
X = torch.randn(5, 9, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
CLUSTERS = torch.tensor([0, 2, 1, 2, 2])
MASK = torch.arange(9) < torch.tensor([9, 4, 7, 0, 1]).unsqueeze(1)


def make(num_groups: int = GROUPS, **options: Any) -> sml.MoE:
    torch.manual_seed(0)
    router = sml.ClusteredRouter(DIM, EXPERTS, TOP_K, num_groups=num_groups, **options)
    nn.init.normal_(router.weight)
    if router.expert_bias is not None:
        nn.init.normal_(router.expert_bias)
    return sml.MoE(DIM, 5, EXPERTS, router=router, aux_loss_coef=0.3, z_loss_coef=0.1).double()


def of_group(moe: sml.MoE, group: int) -> sml.MoE:
    """A plain block of the experts of one group."""
    own = slice(group * EXPERTS // GROUPS, (group + 1) * EXPERTS // GROUPS)
    router = moe.router
    options = {"score": router.score, "bias_update_rate": router.bias_update_rate}
    plain = sml.TopKRouter(DIM, EXPERTS // GROUPS, TOP_K, **options)
    small = sml.MoE(DIM, 5, EXPERTS // GROUPS, router=plain, aux_loss_coef=0.3, z_loss_coef=0.1).double()
    with torch.no_grad():
        plain.weight.copy_(router.weight[own])
        if plain.expert_bias is not None:
            plain.expert_bias.copy_(router.expert_bias[own])
        for name, parameter in small.experts.named_parameters():
            parameter.copy_(moe.experts.get_parameter(name)[own])
    return small


@pytest.mark.parametrize("options", [{}, {"score": "sigmoid", "bias_update_rate": 0.1}, {"renormalize": False}])
def test_every_cluster_computes_and_is_balanced_as_a_block_of_its_own_group(options: dict[str, Any]) -> None:
    moe = make(**options)
    smalls = [of_group(moe, group) for group in range(GROUPS)]
    for small in smalls:
        small.router.renormalize = moe.router.renormalize
    out = moe(X, MASK, cluster_ids=CLUSTERS)
    loss, losses = sml.auxiliary_loss(moe), []
    expected = torch.zeros_like(X)
    for group, small in enumerate(smalls):
        is_own = MASK & CLUSTERS.eq(group).unsqueeze(1)
        expected = expected.masked_scatter(is_own.unsqueeze(-1), small(X[is_own]))
        # The balance of a group counts as its tokens do, and so does the z-loss, which is a mean over tokens.
        losses.append(sml.auxiliary_loss(small) * (is_own.sum().double() / MASK.sum()))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss, torch.stack(losses).sum(), rtol=1e-12, atol=1e-14)
    (out.square().sum() + loss).backward()
    (expected.square().sum() + torch.stack(losses).sum()).backward()
    for name, parameter in moe.named_parameters():
        gradient = torch.cat([small.get_parameter(name).grad for small in smalls])
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-13, msg=name)


def test_ids_are_of_sequences_or_of_tokens_and_capacities_and_files_are_as_of_other_routers() -> None:
    moe = make()
    of_tokens = CLUSTERS.unsqueeze(1).expand(5, 9)
    expected = moe(X, cluster_ids=CLUSTERS)
    assert torch.equal(moe(X, cluster_ids=of_tokens), expected)
    assert torch.equal(moe(X.flatten(0, 1), cluster_ids=of_tokens.flatten()).view_as(X), expected)
    assert torch.equal(moe(X[1], cluster_ids=CLUSTERS[1]), moe(X[1:2], cluster_ids=CLUSTERS[1:2])[0])
    # One group is plain top-k, from the same file.
    plain = sml.MoE(DIM, 5, EXPERTS, TOP_K).double()
    plain.load_state_dict(moe.state_dict())
    torch.testing.assert_close(make(num_groups=1)(X, cluster_ids=CLUSTERS * 0), plain(X), rtol=1e-12, atol=1e-14)
    moe.experts.capacity = sml.MoE(DIM, 5, EXPERTS, capacity_factor=0.5).experts.capacity
    reader = sml.LoadReader(moe)
    moe(X, cluster_ids=CLUSTERS).sum().backward()
    (load,) = reader.read().values()
    assert load.popularity_E.reshape(GROUPS, -1).sum(1).tolist() == [18, 18, 54]
    assert load.num_dropped_tokens == 45


def test_a_replay_keeps_the_recorded_group() -> None:
    moe = make()
    with sml.record_routing(moe) as routing:
        expected = moe(X, cluster_ids=CLUSTERS)
    with sml.replay_routing(moe, routing):
        actual = moe(X, cluster_ids=CLUSTERS * 0)
    assert torch.equal(actual, expected)


def test_the_bias_moves_towards_the_less_popular_of_a_group() -> None:
    router = make(bias_update_rate=0.5).router
    before_E: Tensor = router.expert_bias.clone()
    router.update_bias(np.array([9, 1, 5, 5, 0, 0, 0, 0, 7, 8, 8, 9]))
    step_E = [-1, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, -1]
    assert torch.equal(router.expert_bias - before_E, (before_E + 0.5 * torch.tensor(step_E)) - before_E)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="num_groups must divide num_experts=12, got 5"):
        make(num_groups=5)
    with pytest.raises(
        ValueError, match="num_groups=12 gives groups of 1 experts, but top_k is 2. Choose num_groups=6"
    ):
        make(num_groups=12)
    with pytest.raises(ValueError, match="num_groups must be a whole number of 1 or more, got 0"):
        make(num_groups=0)
    with pytest.raises(ValueError, match=r"by the clusters of sequences, and got none. Call moe\(x, cluster_ids=ids\)"):
        make()(X)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=r"cluster ids must be in 0..2, as there are num_groups=3, got .*Make as"):
            make()(X, cluster_ids=CLUSTERS.where(CLUSTERS != 1, wrong))


def test_the_router_compiles_as_one_graph() -> None:
    router, x_TD, clusters_T = make().router, X.flatten(0, 1), CLUSTERS.repeat_interleave(9)
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    actual, expected = compiled(x_TD, cluster_ids_T=clusters_T), router(x_TD, cluster_ids_T=clusters_T)
    assert torch.equal(actual.expert_ids_TK, expected.expert_ids_TK)
    assert torch.equal(actual.weights_TK, expected.weights_TK)
