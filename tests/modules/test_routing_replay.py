from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swiftmoe_lightning as sml

DIM, HIDDEN, E, K, T = 6, 5, 8, 2, 16


def make(seed: int = 0, **options: Any) -> sml.MoE:
    torch.manual_seed(seed)
    sizes = {"dim": DIM, "hidden_dim": HIDDEN, "num_experts": E, "top_k": K, "dtype": torch.float64}
    moe = sml.MoE(**{**sizes, **options})
    # Scores that differ, so that the choice matters.
    if isinstance(moe.router, sml.TopKRouter):
        nn.init.normal_(moe.router.weight)
    return moe


def tokens(seed: int, num_tokens: int = T) -> Tensor:
    return torch.randn(num_tokens, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_ids(seed: int, num_tokens: int = T, top_k: int = K) -> Tensor:
    return torch.rand(num_tokens, E, generator=torch.Generator().manual_seed(seed)).argsort(-1)[:, :top_k]


def gradients(module: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


# Against plain torch.


def dense(moe: sml.MoE, x_TD: Tensor, ids_TK: Tensor, budget: int | None = None) -> tuple[Tensor, Tensor]:
    """(output, auxiliary loss) of all experts on all tokens, where ids are fixed; of assignments the best `budget`."""
    router, experts = moe.router, moe.experts
    logits_TE = x_TD @ router.weight.T
    scores_TE = logits_TE.softmax(-1) if router.score == "softmax" else logits_TE.sigmoid()
    weights_TK = scores_TE.gather(-1, ids_TK)
    if router.renormalize:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    if budget is not None:
        least = weights_TK.flatten().sort(descending=True).values[budget - 1]
        weights_TK = weights_TK * (weights_TK >= least)
    gate_TEF, up_TEF = torch.einsum("td,ehd->teh", x_TD, experts.gate_up_proj).chunk(2, -1)
    y_TED = torch.einsum("tef,edf->ted", F.silu(gate_TEF) * up_TEF, experts.down_proj)
    out_TD = (weights_TK.unsqueeze(-1) * y_TED.gather(1, ids_TK.unsqueeze(-1).expand(-1, -1, DIM))).sum(1)
    share_E = torch.bincount(ids_TK.flatten(), minlength=E).double() / ids_TK.numel()
    probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
    balance = E * (share_E * probs_TE.mean(0)).sum()
    return out_TD, moe.aux_loss_coef * balance + moe.z_loss_coef * logits_TE.logsumexp(-1).square().mean()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_outputs_and_gradients_of_a_replay_equal_plain_torch_with_fixed_ids(
    score: str, top_k: int, capacity_factor: float | None
) -> None:
    torch.manual_seed(1)
    router = sml.TopKRouter(DIM, E, top_k, score=score, dtype=torch.float64)
    moe = make(top_k=top_k, router=router, capacity_factor=capacity_factor, aux_loss_coef=0.3, z_loss_coef=0.1)
    x_TD, ids_TK = tokens(0).requires_grad_(), random_ids(0, top_k=top_k)
    with sml.replay_routing(moe, {"experts": ids_TK}):
        out_TD = moe(x_TD)
        actual = out_TD, sml.auxiliary_loss(moe)
    expected = dense(moe, x_TD, ids_TK, None if capacity_factor is None else T * top_k // 2)
    inputs = [x_TD, *moe.parameters()]
    probe = tokens(9)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    pairs = [((out * probe).sum() + loss) for out, loss in (actual, expected)]
    for a, e in zip(*(torch.autograd.grad(loss, inputs) for loss in pairs), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


# Recording.


@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.7}, {"top_k": 1}, {"num_shared_experts": 1}])
def test_a_replay_of_the_own_recording_changes_no_bit(options: dict[str, Any]) -> None:
    model = nn.Sequential(make(0, **options), make(1, **options))
    x = tokens(0).view(4, 4, DIM)
    with sml.record_routing(model) as routing:
        expected = model(x)
    assert {name: (ids.dtype, *ids.shape) for name, ids in routing.items()} == {
        name: (torch.uint8, T, options.get("top_k", K)) for name in ("0.experts", "1.experts")
    }
    with sml.replay_routing(model, routing):
        actual = model(x)
    assert torch.equal(actual, expected)
    assert_same(gradients(model, actual.square().sum()), gradients(model, expected.square().sum()))


def test_recorded_ids_are_the_routers_in_the_smallest_dtype() -> None:
    for num_experts, dtype in ((255, torch.uint8), (256, torch.uint16)):
        moe = make(num_experts=num_experts)
        # The last expert is chosen, too.
        nn.init.constant_(moe.router.weight[-1], 9.0)
        x_TD = tokens(0).abs()
        with torch.no_grad(), sml.record_routing(moe) as routing:
            moe(x_TD[:5])
            moe(x_TD[5:])
        assert routing["experts"].dtype == dtype
        expected = moe.router(x_TD).expert_ids_TK
        assert num_experts - 1 in expected
        assert torch.equal(routing["experts"].long(), expected)
        other = make(1, num_experts=num_experts)
        with torch.no_grad(), sml.replay_routing(other, routing), sml.record_routing(nn.Sequential(moe)) as again:
            # One forward replays what two recorded.
            other(x_TD)
            moe(x_TD)
        assert torch.equal(again["0.experts"].long(), expected)


def test_tokens_without_a_recording_are_routed_live() -> None:
    moe, x_TD = make(), tokens(0)
    live_TK, ids_TK = moe.router(x_TD).expert_ids_TK, random_ids(0)
    is_missing_T = torch.arange(T) % 3 == 0
    expected, _ = dense(moe, x_TD, torch.where(is_missing_T.unsqueeze(1), live_TK, ids_TK))
    with sml.replay_routing(moe, {"experts": ids_TK.masked_fill(is_missing_T.unsqueeze(1), -1)}):
        torch.testing.assert_close(moe(x_TD), expected, rtol=1e-12, atol=1e-12)


# Activation checkpointing, several forwards, and a layer that is called several times.


class Twice(nn.Module):
    """Two layers, one of which is called twice, in one checkpointed region."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second = make(0), make(1)
        self.use_reentrant = use_reentrant

    def inner(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        return x + self.first(x)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_reentrant is None:
            return self.inner(x)
        out: Tensor = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return out


def train(use_reentrant: bool | None, backward: str) -> dict[str, Tensor]:
    """Gradients of two micro-batches with random routing, of a live one before them and of another one after them."""
    model = Twice(use_reentrant)
    reader = sml.LoadReader(model)
    x = tokens(0, 2 * T).requires_grad_()
    with sml.record_routing(model) as recorded:
        actual = gradients(model, model(x[:T]).square().sum())
    assert {name: len(ids_TK) for name, ids_TK in recorded.items()} == {"first.experts": 2 * T, "second.experts": T}
    assert model.first.experts.routing_tap is None
    actual = {f"recorded {name}": g for name, g in actual.items()}
    reader.read()

    routing = {"first.experts": random_ids(1, 4 * T), "second.experts": random_ids(2, 2 * T)}
    model.zero_grad()
    with sml.replay_routing(model, routing):
        losses = []
        for part in x.split(T):
            losses.append(model(part).square().sum())
            if backward == "each":
                losses.pop().backward()
    if backward == "together" and losses:
        torch.stack(losses).sum().backward()
    else:
        while losses:
            losses.pop(0).backward()
    losses.clear()
    for name, load in reader.read().items():
        assert load.popularity_E.tolist() == torch.bincount(routing[name].flatten(), minlength=E).tolist()
    actual |= {f"replayed {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    actual |= {f"live {name}": g for name, g in gradients(model, model(x[:T]).square().sum()).items()}
    assert model.first.experts.routing_tap is None
    return actual


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backward", ["each", "together", "in_order"])
def test_forwards_that_checkpointing_repeats_choose_as_the_first_time_and_are_recorded_and_counted_once(
    use_reentrant: bool, backward: str
) -> None:
    actual, expected = train(use_reentrant, backward), train(None, backward)
    assert len(actual) == 3 * 6
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-12, atol=1e-12, msg=name)


# Other routers, copies, compilation, bias.


class OwnRouter(nn.Module):
    """A router of a user's: noise, groups and weights of its own, and one top-k."""

    def __init__(self, choose: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(DIM, E, dtype=torch.float64)
        self.choose = choose

    def forward(self, x_TD: Tensor) -> sml.RouterOutput:
        logits_TE = self.gate(x_TD)
        weights_TK, ids_TK = self.choose(logits_TE.sigmoid())
        return sml.RouterOutput(ids_TK, 2 * weights_TK.softmax(-1), logits_TE)


def best_group(scores_TE: Tensor) -> Tensor:
    """Scores of the better half of the experts, as in DeepSeek-V2's group-limited routing."""
    best_TG = scores_TE.view(-1, 2, E // 2).amax(-1)
    is_out_TG = best_TG < best_TG.amax(-1, keepdim=True)
    return scores_TE.masked_fill(is_out_TG.repeat_interleave(E // 2, -1), 0.0)


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores_TE: torch.topk(scores_TE, K, dim=-1, sorted=False),
        lambda scores_TE: best_group(scores_TE).topk(K, dim=-1),
    ],
)
def test_any_router_that_chooses_by_one_topk_replays_by_its_own_weights(choose: Callable[[Tensor], Any]) -> None:
    moe = make(router=OwnRouter(choose))
    x_TD, ids_TK = tokens(0), random_ids(0)
    with sml.replay_routing(moe, {"experts": ids_TK}):
        actual = moe(x_TD)
    weights_TK = 2 * moe.router.gate(x_TD).sigmoid().gather(-1, ids_TK).softmax(-1)
    torch.testing.assert_close(actual, moe.experts(x_TD, ids_TK, weights_TK), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores_TE: tuple(part[:, :K] for part in scores_TE.sort(-1, descending=True)),
        lambda scores_TE: (scores_TE.topk(K).values, scores_TE.topk(K).indices),
        lambda scores_TE: (scores_TE.topk(K).values, scores_TE.topk(K).indices.flip(-1)),
    ],
)
def test_a_router_that_chooses_in_another_way_is_refused_by_name(choose: Callable[[Tensor], Any]) -> None:
    moe = make(router=OwnRouter(choose))
    with (
        pytest.raises(ValueError, match=r"router of 'experts', OwnRouter, cannot replay.*topk.*\[tokens, 8\]"),
        sml.replay_routing(moe, {"experts": random_ids(0)}),
    ):
        moe(tokens(0))


class OwnBlock(nn.Module):
    """Experts in a block of a user's, with a router as Hugging Face's are, or one that gives something else."""

    def __init__(self, returns: Callable[..., Any]) -> None:
        super().__init__()
        self.gate, self.experts = OwnGate(returns), sml.Experts(E, DIM, HIDDEN, dtype=torch.float64)
        self.shift, self.num_padding = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        _, weights_TK, ids_TK = self.gate(x)
        ids_TK = (ids_TK + self.shift) % E
        ids_TK[: self.num_padding] = -1
        out: Tensor = self.experts(x, ids_TK, weights_TK)
        return out


class OwnGate(nn.Linear):
    def __init__(self, returns: Callable[..., Any]) -> None:
        super().__init__(DIM, E, dtype=torch.float64)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        logits_TE = super().forward(x)
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(K)
        return self.returns(logits_TE, weights_TK, ids_TK)


def as_tuple(*parts: Tensor) -> tuple[Tensor, ...]:
    return parts


def test_experts_beside_a_router_of_ones_own_replay_and_the_block_can_be_copied_meanwhile() -> None:
    block, x_TD, ids_TK = OwnBlock(as_tuple), tokens(0).requires_grad_(), random_ids(0)
    live = block(x_TD)
    with sml.replay_routing(block, {"experts": ids_TK}):
        out_TD = block(x_TD)
        copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block))
    weights_TK = F.linear(x_TD, block.gate.weight, block.gate.bias).softmax(-1).gather(-1, ids_TK)
    out_TD.sum().backward()
    for one in (block, *copies):
        assert torch.equal(one(x_TD), live)
        assert torch.equal(one(x_TD), live)
    assert "forward" not in vars(block.gate)
    assert block.experts.routing_tap is None
    torch.testing.assert_close(out_TD, block.experts(x_TD, ids_TK, weights_TK), rtol=1e-12, atol=1e-12)


def test_a_block_may_leave_out_assignments_of_its_router() -> None:
    block, x_TD, ids_TK = OwnBlock(as_tuple), tokens(0), random_ids(0)
    with sml.replay_routing(block, {"experts": ids_TK}):
        whole_TD = block(x_TD)
    block.num_padding = 3
    with sml.replay_routing(block, {"experts": ids_TK}):
        out_TD = block(x_TD)
    assert not out_TD[:3].any()
    torch.testing.assert_close(out_TD[3:], whole_TD[3:], rtol=1e-12, atol=1e-12)


def test_ids_that_change_between_router_and_experts_and_outputs_without_ids_are_refused() -> None:
    block = OwnBlock(as_tuple)
    block.shift = 1
    message = "'experts' got other expert ids than its router OwnGate gave"
    with pytest.raises(RuntimeError, match=message), sml.record_routing(block):
        block(tokens(0))
    block = OwnBlock(lambda logits_TE, *_: (logits_TE, logits_TE))
    message = r"router of 'experts', OwnGate, returned \['torch.float64 \[16, 8\]'"
    with pytest.raises(TypeError, match=message), sml.record_routing(block):
        block(tokens(0))


@torch.no_grad()
def test_a_compiled_model_replays_and_is_as_before_afterwards() -> None:
    moe, x_TD = make().eval(), tokens(0)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(moe, backend=backend)
    expected = compiled(x_TD)
    num_graphs = len(graphs)
    with sml.replay_routing(compiled, {"_orig_mod.experts": random_ids(0)}):
        actual = compiled(x_TD)
    torch.testing.assert_close(actual, dense(moe, x_TD, random_ids(0))[0])
    assert torch.equal(compiled(x_TD), expected)
    assert len(graphs) == num_graphs
    torch._dynamo.reset()


def test_the_balancing_bias_follows_replayed_assignments() -> None:
    router = sml.TopKRouter(DIM, E, K, bias_update_rate=0.1, dtype=torch.float64)
    moe = make(router=router)
    engine = sml.SwiftMoEEngine(moe)
    optimizer = engine.prepare_optimizer(torch.optim.SGD(moe.parameters(), lr=0.1))
    ids_TK = torch.tensor([[0, 1]] * T)
    with sml.replay_routing(moe, {"experts": ids_TK}):
        moe(tokens(0)).sum().backward()
    optimizer.step()
    assert router.expert_bias is not None
    torch.testing.assert_close(router.expert_bias, torch.tensor([-0.1] * 2 + [0.1] * 6))


# Arrays.


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 5), st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 255, 256, 300]), st.integers(0, 2**31)
)
def test_arrays_come_back_as_they_were(
    num_tokens: int, num_layers: int, top_k: int, num_experts: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    array = rng.permuted(np.tile(np.arange(num_experts), (num_tokens, num_layers, 1)), axis=-1)[..., :top_k]
    array[rng.random((num_tokens, num_layers)) < 0.3] = -1
    model = nn.Sequential(*(sml.MoE(1, 1, num_experts, top_k, device="meta") for _ in range(num_layers)))
    for given_array in (array.astype(np.int16), torch.from_numpy(array)):
        routing = sml.routing_from_array(given_array, model)
        assert list(routing) == [f"{i}.experts" for i in range(num_layers)]
        assert {ids_TK.dtype for ids_TK in routing.values()} == {torch.uint8 if num_experts < 256 else torch.uint16}
        back = sml.routing_to_array(routing)
        assert back.dtype == np.int32
        assert np.array_equal(back, array)


# What does not fit.


@pytest.mark.parametrize(
    ("ids_TK", "error", "message"),
    [
        (random_ids(0, T + 1), ValueError, r"'experts' has routed 16 tokens in this context, .* is of 17"),
        (random_ids(0, T - 1), ValueError, r"'experts' routes tokens 0..15 of this context, .* is of 15"),
        (random_ids(0, top_k=3), ValueError, r"has 3 experts a token, and its router chooses 2"),
        (random_ids(0).float(), TypeError, r"must be a tensor of integers \[tokens, top_k\], got torch.float32"),
        ([[0, 1]] * T, TypeError, r"must be a tensor of integers \[tokens, top_k\], got list"),
        (random_ids(0).view(4, 4, 2), ValueError, r"must have shape \[tokens, top_k\], got \[4, 4, 2\]. Flatten"),
        (random_ids(0) + 1, ValueError, r"token \d+ of the recording of 'experts' has experts .*8.*of 0..7"),
        (torch.zeros(T, K, dtype=torch.int32), ValueError, r"token 0 .* has experts \[0, 0\].*unfilled rows"),
        (torch.tensor([[0, 1], [-1, 1]] * 8), ValueError, r"token 1 .* has experts \[-1, 1\].*-1 for all of a token"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(ids_TK: Any, error: type[Exception], message: str) -> None:
    moe = make()
    with torch.no_grad(), pytest.raises(error, match=message), sml.replay_routing(moe.eval(), {"experts": ids_TK}):
        moe(tokens(0))
    assert moe.experts.routing_tap is None


def test_other_layers_no_layers_no_router_and_nested_contexts_are_refused() -> None:
    model = nn.Sequential(make(0), make(1))
    message = r"is of 1 layers, and the model has 2.*Not recorded.*'1.experts'.*: \[\]"
    with pytest.raises(ValueError, match=message), sml.replay_routing(model, {"0.experts": random_ids(0)}):
        pass
    with pytest.raises(ValueError, match=r"Linear has no MoE layers.*convert\(\)"), sml.record_routing(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match=r"no router was found beside the experts \['experts'\]"):
        sml.routing_from_array(np.zeros((1, 1, 1), int), nn.ModuleDict({"experts": make().experts}))
    with sml.record_routing(model), pytest.raises(RuntimeError, match="cannot be nested"), sml.record_routing(model[0]):
        pass
    moe = sml.MoE(dim=4, hidden_dim=4, num_experts=2, router=sml.ExpertChoiceRouter(4, 2, 1))
    with pytest.raises(ValueError, match=r"in \['experts'\] experts choose tokens"), sml.record_routing(moe):
        pass


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.zeros((T, 2)), TypeError, "must be integers, got torch.float64"),
        (np.zeros((T, 2), int), ValueError, r"must have shape \[tokens, layers, top_k\], got \[16, 2\]"),
        (torch.zeros(T, 3, K).int(), ValueError, r"are of 3 layers, .* has 2 MoE layers.*array\[:, moe_layers"),
        (np.full((T, 2, 1), 8), ValueError, r"token 0 of the recording of '0.experts' has experts \[8\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(array: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sml.routing_from_array(array, nn.Sequential(make(0), make(1)))


def test_layers_that_differ_make_no_array() -> None:
    with pytest.raises(ValueError, match=r"same \[tokens, top_k\], got \{'a': \[2, 1\], 'b': \[2, 2\]\}"):
        sml.routing_to_array({"a": torch.zeros(2, 1).int(), "b": torch.zeros(2, 2).int()})
