from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from swiftmoe_lightning.analysis import PRESETS, ModelSizes, model_of
from swiftmoe_lightning.analysis.model_sizes import sizes_of_config
from tests import hf_models

KIND_OF = {
    "olmoe-1b-7b": "olmoe",
    "mixtral-8x7b": "mixtral",
    "qwen3-30b-a3b": "qwen3_moe",
    "deepseek-v3": "deepseek_v3",
}


def count(model: Any) -> tuple[int, int]:
    """(parameters of experts, all others); only experts have three dims."""
    sizes = [(p.ndim, p.numel()) for p in model.parameters()]
    experts = sum(numel for ndim, numel in sizes if ndim == 3)
    return experts, sum(numel for _, numel in sizes) - experts


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_transformers_gives_it(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        config = transformers.CONFIG_MAPPING[KIND_OF[name]](**PRESETS[name])
        experts, others = count(transformers.AutoModelForCausalLM.from_config(config))
    actual = model_of(name, {})
    assert actual.num_layers * actual.num_experts * actual.expert_parameters == experts
    # Norms are not counted.
    assert 0 <= others - actual.dense_parameters <= 3e-4 * others


@pytest.mark.parametrize("family", sorted(hf_models.FAMILIES.keys() - {"nemotron_h"}))
def test_experts_of_other_families_are_found_in_their_configurations(family: str) -> None:
    pytest.importorskip("transformers")
    model = hf_models.build(family)
    actual = sizes_of_config(model.config.to_dict())
    assert actual.num_layers * actual.num_experts * actual.expert_parameters == count(model)[0]
    assert (actual.top_k, actual.dim) == (2, 16)


# 10 + 10 words of 4; 2 heads of 2: 4 matrices of 16 a layer.
CONFIG = {
    "vocab_size": 10,
    "hidden_size": 4,
    "intermediate_size": 7,
    "moe_intermediate_size": 3,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 5,
    "num_experts_per_tok": 2,
}


def sizes(**changes: Any) -> ModelSizes:
    return sizes_of_config({**CONFIG, **changes})


def test_the_other_parameters_are_those_worked_out_by_hand() -> None:
    assert sizes() == ModelSizes(
        num_layers=3, num_experts=5, top_k=2, dim=4, hidden_dim=3, dense_parameters=80 + 3 * (64 + 20)
    )
    assert sizes(tie_word_embeddings=True).dense_parameters == 40 + 3 * (64 + 20)
    # One key and value head of 3, two of queries: 4 * 3 * (2 + 2 + 1 + 1).
    assert sizes(head_dim=3, num_key_value_heads=1).dense_parameters == 80 + 3 * (72 + 20)
    # A dense layer has no router, and three matrices of 4 x 7.
    assert sizes(first_k_dense_replace=1).dense_parameters == 80 + 3 * 64 + 2 * 20 + 84
    # Shared experts: of 3 each, or of one width.
    assert sizes(n_shared_experts=2).dense_parameters == 80 + 3 * (64 + 20 + 72)
    assert sizes(shared_expert_intermediate_size=5).dense_parameters == 80 + 3 * (64 + 20 + 60)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"first_k_dense_replace": 1}, 2),
        ({"decoder_sparse_step": 2}, 1),
        ({"interleave_moe_layer_step": 3}, 1),
        ({"mlp_only_layers": [0, 2]}, 1),
        ({"mlp_layer_types": ["dense", "sparse", "sparse"], "first_k_dense_replace": 0}, 2),
        ({"moe_layer_freq": 1}, 3),
    ],
)
def test_only_layers_with_experts_count(changes: dict[str, Any], layers: int) -> None:
    assert sizes(**changes).num_layers == layers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "it does not say num_experts or n_routed_experts or num_local_experts. Give the sizes"),
        ({"num_experts": "many"}, "num_experts must be a whole number of 1 or more, got 'many'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of 1 or more, got 0"),
        ({"hidden_size": 2**21}, "hidden_size must be at most 1048576, got 2097152"),
        ({"num_experts_per_tok": 6}, r"top_k must be at most num_experts \(5\), got 6"),
        ({"first_k_dense_replace": 3}, "num_layers must be a whole number of 1 or more, got 0"),
        ({"moe_layer_freq": 2}, "which layers have experts is said by moe_layer_freq, which is not understood"),
        ({"mlp_layer_types": 3}, "mlp_layer_types must be a list, got 3"),
    ],
)
def test_a_configuration_that_does_not_say_the_sizes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizes(**changes)


def test_a_file_is_read_and_sizes_by_hand_come_before_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": CONFIG}))
    for path in (tmp_path, tmp_path / "config.json"):
        assert model_of(str(path), {}) == sizes()
    changed = model_of(str(tmp_path), {"num_layers": 1, "dense_parameters": 0, "top_k": None})
    assert (changed.num_layers, changed.dense_parameters, changed.top_k) == (1, 0, 2)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b"[]"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: (it is not JSON|a configuration must be a JSON object, got list)"):
        model_of(str(path), {})


def test_without_a_model_all_sizes_are_needed() -> None:
    given = {"num_layers": 2, "num_experts": 4, "top_k": 2, "dim": 8}
    assert model_of(None, {**given, "hidden_dim": 4}).expert_parameters == 96
    with pytest.raises(ValueError, match="and hidden_dim are missing"):
        model_of(None, given)
    with pytest.raises(FileNotFoundError, match="there is no model nope. Give a config.json, or one of olmoe-1b-7b"):
        model_of("nope", {})
