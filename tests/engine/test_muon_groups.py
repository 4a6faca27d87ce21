"""Which parameters go to Muon and which to AdamW, and how gate and up of a gated activation are told apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swiftmoe_lightning as sml
from swiftmoe_lightning.engine.muon_groups import gate_layout
from swiftmoe_lightning.modules import Experts


class Language(nn.Module):
    """An embedding, a norm, attention's linear, experts with and without biases, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.query = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.gated = sml.MoE(4, 6, 3)
        self.plain = sml.MoE(4, 6, 3, activation="gelu", bias=True)
        self.filter = nn.Conv1d(4, 4, 3)
        self.lm_head = nn.Linear(4, 7, bias=False)


def by_name(module: nn.Module, groups: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Each group's settings and the names of its parameters."""
    names = {p: name for name, p in module.named_parameters()}
    keys = ("use_muon", "experts", "transposed")
    return [(*(g.get(key) for key in keys), sorted(names[p] for p in g["params"])) for g in groups]


def test_hidden_matrices_and_experts_are_muons_and_the_rest_is_adamws() -> None:
    module = Language()
    groups = sml.muon_groups(module, adamw=["lm_head", "plain.router"], lr=3e-4)
    assert groups[-1]["lr"] == 3e-4
    vectors = ["filter.bias", "filter.weight", "norm.bias", "norm.weight", "query.bias"]
    biases = ["plain.experts.down_proj_bias", "plain.experts.up_proj_bias"]
    assert by_name(module, groups) == [
        (True, None, False, ["gated.router.weight", "query.weight"]),
        (True, "halves", False, ["gated.experts.gate_up_proj"]),
        (True, "matrix", False, ["gated.experts.down_proj", "plain.experts.down_proj", "plain.experts.up_proj"]),
        (False, None, None, sorted(["embed.weight", "lm_head.weight", *vectors, *biases, "plain.router.weight"])),
    ]
    muon = sml.Muon(groups, lr=0.02, weight_decay=0.01)
    assert [group["lr"] for group in muon.param_groups] == [0.02, 0.02, 0.02, 3e-4]
    # AdamW's weight decay and eps are its own.
    assert [(group["weight_decay"], group["eps"]) for group in muon.param_groups[2:]] == [(0.01, 1e-7), (0.01, 1e-8)]


def test_a_name_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"adamw names \['head'\], and no parameter that trains has it in its name"):
        sml.muon_groups(Language(), adamw="head")


def in_halves(z: Tensor) -> Tensor:
    gate, up = z.chunk(2, dim=-1)
    return gate.clamp(max=7) * torch.sigmoid(1.702 * gate) * (up.clamp(-7, 7) + 1)


def in_turn(z: Tensor) -> Tensor:
    return in_halves(torch.cat((z[..., ::2], z[..., 1::2]), dim=-1))


def mixed(z: Tensor) -> Tensor:
    return in_halves(z).cumsum(-1)


def test_gate_and_up_are_told_apart_by_what_outputs_depend_on() -> None:
    assert [gate_layout(f) for f in ("swiglu", in_halves, in_turn, mixed, torch.relu)] == [
        "halves",
        "halves",
        "interleaved",
        None,
        None,
    ]
    with torch.no_grad():
        assert gate_layout(in_turn) == "interleaved"


def test_experts_whose_gate_is_not_seen_need_a_group_by_hand() -> None:
    parameters = dict(Experts(3, 4, 6).named_parameters())
    experts = Experts.from_parameters(parameters, mixed)
    with pytest.raises(ValueError, match="the activation of 'gate_up_proj' does not show which of its rows are the"):
        sml.muon_groups(experts)
    by_hand = {"params": [experts.gate_up_proj], "experts": "matrix"}
    sml.SwiftMoEEngine(experts).prepare_optimizer(sml.Muon([by_hand]))
    with pytest.raises(ValueError, match="'down_proj', of shape .* needs experts='matrix', transposed=False"):
        sml.SwiftMoEEngine(experts).prepare_optimizer(
            sml.Muon([{"params": [experts.down_proj], "experts": "matrix", "transposed": True}])
        )


@pytest.mark.parametrize(
    ("family", "layout", "transposed"),
    [("mixtral", "halves", False), ("gpt_oss", "interleaved", True), ("llama4_text", "halves", True)],
)
def test_converted_models_say_how_their_experts_lie(family: str, layout: str, transposed: bool) -> None:
    pytest.importorskip("transformers")
    from tests import hf_models

    model = sml.convert(hf_models.build(family))
    groups = by_name(model, sml.muon_groups(model))
    found = {name.rpartition(".")[2]: (g[1], g[2]) for g in groups for name in g[3] if ".experts." in name and g[0]}
    assert found == {"gate_up_proj": (layout, transposed), "down_proj": ("matrix", transposed)}
    rest = groups[-1][3]
    # Embeddings and the head, which transformers names, are AdamW's.
    assert any("embed_tokens" in name for name in rest)
    assert "lm_head.weight" in rest or model.lm_head.weight is model.get_input_embeddings().weight
    assert not any("q_proj.weight" in name for name in rest)
