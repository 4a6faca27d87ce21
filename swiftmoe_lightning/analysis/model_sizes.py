"""A model's sizes, as far as traffic and memory depend on them: published ones, or those of a Hugging Face config.json.

L MoE layers, E experts of a layer, K top-k, D model dim, F hidden dim of an expert.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from swiftmoe_lightning.config import check_whole

# What the models' own config.json files say, as far as it is read here.
PRESETS: Final[Mapping[str, Mapping[str, Any]]] = {
    "olmoe-1b-7b": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
    },
    "mixtral-8x7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen3-30b-a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "deepseek-v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
    },
}
# Families give them different names.
_EXPERTS: Final = ("num_experts", "n_routed_experts", "num_local_experts")
_HIDDEN: Final = ("moe_intermediate_size", "intermediate_size")
# Other ways to say which layers have experts, which are not understood here.
_OTHER_PATTERNS: Final = ("layers_block_type", "hybrid_override_pattern", "moe_layer_freq")
_FIX: Final = "Give the sizes by hand: --layers, --experts, --top-k, --dim, --hidden-dim, --dense-parameters."
# More than any model has; they keep products finite, and bytes below what `Machine` takes.
_MOST: Final = 2**20
_MOST_FILE_BYTES: Final = 10_000_000


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """Sizes of a model whose experts have a gate, an up and a down projection (SwiGLU and its like).

    Attributes:
        num_layers: L, those with experts.
        num_experts: E of each of them.
        top_k: K.
        dim: D.
        hidden_dim: F of one expert.
        dense_parameters: all parameters that are not of routed experts.

    Raises:
        ValueError: for a value out of range.
    """

    num_layers: int
    num_experts: int
    top_k: int
    dim: int
    hidden_dim: int
    dense_parameters: int = 0

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("num_layers", "num_experts", "top_k", "dim", "hidden_dim")}
        check_whole(**sizes)
        check_whole(0, dense_parameters=self.dense_parameters)
        for name, most in {**dict.fromkeys(sizes, _MOST), "dense_parameters": _MOST**2}.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}. Give the model's own.")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k must be at most num_experts ({self.num_experts}), got {self.top_k}.")

    @property
    def row_elements(self) -> tuple[tuple[int, int], ...]:
        """For each tensor of an expert, its rows and the elements of one row: gate and up as one, then down."""
        return (2 * self.hidden_dim, self.dim), (self.dim, self.hidden_dim)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one expert, 3 D F."""
        return sum(rows * elements for rows, elements in self.row_elements)


def model_of(name: str | None, sizes: Mapping[str, int | None]) -> ModelSizes:
    """Sizes of a model, of which some, or without a model all, are given by hand.

    Args:
        name: as `read_model` takes it, or None.
        sizes: fields of `ModelSizes`; None takes the model's.

    Raises:
        FileNotFoundError: as `read_model`.
        ValueError: as `read_model`, or where a size is not known.
    """
    given = {field: size for field, size in sizes.items() if size is not None}
    if name is not None:
        return replace(read_model(name), **given)
    if missing := [field for field in ModelSizes.__dataclass_fields__ if field not in {"dense_parameters", *given}]:
        raise ValueError(
            f"without a model its sizes are needed, and {', '.join(missing)} are missing. Name one of "
            f"{', '.join(PRESETS)} or a config.json, or give --layers, --experts, --top-k, --dim and --hidden-dim."
        )
    return ModelSizes(**given)


def read_model(name: str) -> ModelSizes:
    """Sizes of a preset, or of a model's config.json.

    Args:
        name: one of `PRESETS`, or the path of a config.json or of the folder that it is in.

    Raises:
        FileNotFoundError: where there is no such preset or file.
        ValueError: one line, for a file that does not say the sizes.
    """
    if name in PRESETS:
        return sizes_of_config(PRESETS[name])
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.exists():
        raise FileNotFoundError(f"there is no model {name}. Give a config.json, or one of {', '.join(PRESETS)}.")
    if not path.is_file() or path.stat().st_size > _MOST_FILE_BYTES:
        raise ValueError(f"{path}: it is no config.json, but a pipe, a device or a file of more than 10 MB. {_FIX}")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: it is not JSON ({error}). {_FIX}") from error
    try:
        return sizes_of_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def sizes_of_config(config: object) -> ModelSizes:
    """Sizes of the model of a Hugging Face configuration.

    Parameters that are not experts' are counted without norms and biases, and attention as grouped-query attention, or
    as latent attention where there is a `kv_lora_rank`.

    Args:
        config: what config.json holds; of a multimodal model its `text_config` is read.

    Raises:
        ValueError: where a size is missing or cannot be one, or which layers have experts is said in another way.
    """
    if isinstance(config, Mapping) and isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    if not isinstance(config, Mapping):
        raise ValueError(f"a configuration must be a JSON object, got {type(config).__name__}. {_FIX}")
    num_layers = _count_moe_layers(config)
    dim, hidden_dim = _whole(config, "hidden_size"), _whole(config, *_HIDDEN)
    num_experts = _whole(config, *_EXPERTS)
    shared = _whole(config, "shared_expert_intermediate_size", default=0)
    shared += _whole(config, "n_shared_experts", default=0) * hidden_dim
    all_layers = _whole(config, "num_hidden_layers")
    tables = 1 if config.get("tie_word_embeddings") else 2
    dense = tables * _whole(config, "vocab_size") * dim
    dense += all_layers * _attention_parameters(config, dim)
    dense += num_layers * (3 * dim * shared + num_experts * dim)
    dense += (all_layers - num_layers) * 3 * dim * _whole(config, "intermediate_size", default=0)
    return ModelSizes(
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=_whole(config, "num_experts_per_tok"),
        dim=dim,
        hidden_dim=hidden_dim,
        dense_parameters=dense,
    )


def _count_moe_layers(config: Mapping[str, Any]) -> int:
    for name in _OTHER_PATTERNS:
        if config.get(name) not in (None, 1):
            raise ValueError(f"which layers have experts is said by {name}, which is not understood. {_FIX}")
    for name in ("mlp_layer_types", "mlp_only_layers"):
        if not isinstance(config.get(name), list | None):
            raise ValueError(f"{name} must be a list, got {config[name]!r}. {_FIX}")
    if kinds := config.get("mlp_layer_types"):
        return int(kinds.count("sparse"))
    num_layers = _whole(config, "num_hidden_layers")
    first = _whole(config, "first_k_dense_replace", default=0)
    step = _whole(config, "decoder_sparse_step", "interleave_moe_layer_step", default=1)
    dense = {layer for layer in config.get("mlp_only_layers") or () if isinstance(layer, int)}
    return sum(layer >= first and (layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))


def _attention_parameters(config: Mapping[str, Any], dim: int) -> int:
    num_heads = _whole(config, "num_attention_heads")
    if config.get("kv_lora_rank") is None:
        head_dim = _whole(config, "head_dim", default=dim // num_heads)
        return 2 * dim * head_dim * (num_heads + _whole(config, "num_key_value_heads", default=num_heads))
    # Latent attention: queries, keys and values go through narrow inner layers; part of a key is shared by all heads.
    plain, rotary = _whole(config, "qk_nope_head_dim"), _whole(config, "qk_rope_head_dim")
    value, inner = _whole(config, "v_head_dim"), _whole(config, "kv_lora_rank")
    from_dim = _whole(config, "q_lora_rank", default=0)
    queries = num_heads * (plain + rotary)
    total = from_dim * (dim + queries) if from_dim else dim * queries
    return total + dim * (inner + rotary) + inner * num_heads * (plain + value) + num_heads * value * dim


def _whole(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of these entries that is there; where it may be missing for none, it may also be 0."""
    for name in names:
        if config.get(name) is not None:
            check_whole(0 if default == 0 else 1, **{name: config[name]})
            if config[name] > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}, got {config[name]}. {_FIX}")
            return int(config[name])
    if default is None:
        raise ValueError(f"it does not say {' or '.join(names)}. {_FIX}")
    return default
