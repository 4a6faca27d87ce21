"""Tiny random Hugging Face MoE models, one of each kind of experts; transformers is imported when one is built."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 40, 6

# One decoder layer with attention, two where the family's first is special.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 16,
    "num_experts_per_tok": 2,
    # Wide enough that what the experts do is seen in the logits.
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 5,
    "moe_intermediate_size": 12,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_NARROW: dict[str, Any] = {"num_experts": 5, "moe_intermediate_size": 12}

# model_type -> what its configuration needs besides.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    "qwen2_moe": {**_NARROW, "shared_expert_intermediate_size": 12},
    "qwen3_moe": _NARROW,
    "qwen3_next": {**_NARROW, "shared_expert_intermediate_size": 12, "layer_types": ["full_attention"] * 2},
    "olmoe": {"num_experts": 5},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "gpt_oss": {"num_local_experts": 5, "layer_types": ["full_attention"] * 2},
    "glm4_moe": {"n_routed_experts": 5, "moe_intermediate_size": 12, "first_k_dense_replace": 1},
    "minimax": {"num_local_experts": 5, "layer_types": ["full_attention"] * 2},
    "granitemoe": {"num_local_experts": 5},
    "llama4_text": {"num_local_experts": 5, "intermediate_size_mlp": 12},
    "nemotron_h": {
        "n_routed_experts": 5,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 12,
        "layers_block_type": ["attention", "moe"],
        "n_group": 1,
        "topk_group": 1,
    },
}


def build(family: str, seed: int = 0, num_experts: int = 5) -> Any:
    """A model of this family, as from_config gives it, in float32."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    options = {**_COMMON, **FAMILIES[family]}
    for name in {"num_experts", "num_local_experts", "n_routed_experts"} & options.keys():
        options[name] = num_experts
    config = CONFIG_MAPPING[family](**options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        # Some families begin with experts or biases of zeros, which would hide them.
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.3)
    return model


def tokens(step: int, num_sequences: int = 4) -> Tensor:
    """[B, LENGTH] int64 tokens of the global batch."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, VOCABULARY, (num_sequences, LENGTH), generator=generator)
