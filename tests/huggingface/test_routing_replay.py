"""Recording and replaying the routing of converted Hugging Face models, whose routers are their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import swiftmoe_lightning as sml
from tests import hf_models

pytest.importorskip("transformers")

E, TOP_K = 5, 2
# A router without expert ids.
REFUSED = "llama4_text"


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def other_routing(routing: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tokens on other experts."""
    return {name: (ids_TK.long() + 1) % E for name, ids_TK in routing.items()}


@pytest.mark.parametrize("family", [family for family in hf_models.FAMILIES if family != REFUSED])
def test_a_converted_model_replays_itself_to_the_bit_and_other_experts_under_checkpointing(family: str) -> None:
    model, ids = sml.convert(hf_models.build(family)).train(), hf_models.tokens(0)

    def loss() -> Tensor:
        torch.manual_seed(0)
        out: Tensor = model(input_ids=ids, labels=ids).loss
        return out

    with sml.record_routing(model) as routing:
        live = loss()
    assert routing
    assert all(ids_TK.shape == (ids.numel(), TOP_K) and ids_TK.dtype == torch.uint8 for ids_TK in routing.values())
    with sml.replay_routing(model, routing):
        replayed = loss()
    assert torch.equal(replayed, live)
    expected, actual = gradients(model, live), gradients(model, replayed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

    # A reentrant region gives Mixtral's auxiliary loss no gradient, with replay or without.
    model.config.output_router_logits = False
    live, results, lives = loss(), [], []
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:
            # transformers 5.17 knows it by its older name alone.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        before = loss()
        with sml.replay_routing(model, other_routing(routing)):
            other = loss()
        results.append(gradients(model, other))
        lives.append(gradients(model, before))
        assert not torch.equal(other, live)
        assert torch.equal(loss(), live)
    for first, *others in (results, lives):
        for result in others:
            assert result.keys() == first.keys()
            for name in result:
                torch.testing.assert_close(result[name], first[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_weights_are_the_routers_of_its_live_scores(family: str) -> None:
    model, ids = sml.convert(hf_models.build(family)), hf_models.tokens(0)
    name, experts = next((n, m) for n, m in model.named_modules() if isinstance(m, sml.Experts))
    block = model.get_submodule(name.rpartition(".")[0])
    router = block.router if family == "gpt_oss" else block.gate
    seen: dict[str, Tensor] = {}
    router.register_forward_hook(lambda _, args, out: seen.update(logits=out[0]))
    experts.register_forward_pre_hook(lambda _, args: seen.update(ids=args[1], weights=args[2]))
    with sml.record_routing(model) as routing:
        model(input_ids=ids)
    with sml.replay_routing(model, other_routing(routing)):
        model(input_ids=ids)
    ids_TK = other_routing(routing)[name]
    raw_TK = seen["logits"].gather(-1, ids_TK)
    expected = raw_TK.softmax(-1)
    if family == "deepseek_v3":
        expected = raw_TK.sigmoid() / raw_TK.sigmoid().sum(-1, keepdim=True) * router.routed_scaling_factor
    assert torch.equal(seen["ids"], ids_TK)
    torch.testing.assert_close(seen["weights"], expected)


def test_a_router_without_expert_ids_is_refused_by_name() -> None:
    model = sml.convert(hf_models.build(REFUSED))
    with (
        pytest.raises(TypeError, match=r"router of 'model.layers.0.*experts', Llama4Router, .*\[tokens, top_k"),
        sml.record_routing(model),
    ):
        model(input_ids=hf_models.tokens(0))
