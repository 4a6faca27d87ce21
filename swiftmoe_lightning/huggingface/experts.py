"""`experts_implementation="swiftmoe"`: Hugging Face models keep their experts, and run them on our layer.

This is for one device. Under an engine use `convert`, or `ep_implementation="swiftmoe"`.
T tokens, D model dim, F hidden dim, E experts, K top-k, N = T * K assignments.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn

from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.modules.weights import compute_dtype, prepare_weights
from swiftmoe_lightning.ops import Activation, SortedAssignments, combine, expert_layer, expert_rows, sort_assignments

NAME: Final = "swiftmoe"


def register_hf_experts(config: SwiftMoEConfig | None = None) -> None:
    """Make `experts_implementation="swiftmoe"` known to transformers, as for `model.set_experts_implementation`.

    And `ep_implementation="swiftmoe"`, for its `DistributedConfig`, where transformers has that (5.24). Repeatable.
    `import swiftmoe_lightning` does it when transformers was imported before.

    Args:
        config: of the engines of models that are loaded with `ep_implementation="swiftmoe"` from now on. None takes
            the defaults.

    Raises:
        ImportError: without transformers 5 or later.
        ValueError: for a config with `dense` or `expert_parallel_size`, which `DistributedConfig` sets.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            'experts_implementation="swiftmoe" needs transformers 5 or later: pip install "swiftmoe-lightning[hf]".'
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, run_hf_experts)
    if find_spec("transformers.distributed") and find_spec("transformers.distributed.expert_parallel"):
        from swiftmoe_lightning.huggingface.expert_parallel import register_expert_parallel

        register_expert_parallel(config)


def run_hf_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """[T, D] -> [T, D]: the experts' sum, weighted by `top_k_weights`.

    Args:
        module: with the flags and tensors that transformers' `use_experts_implementation` describes.
        hidden_states: [T, D].
        top_k_index: [T, K] int. Assignments outside 0..E-1, as of experts on another rank, add nothing.
        top_k_weights: [T, K].
    """
    x_TD = hidden_states.to(compute_dtype(hidden_states))
    activation, weights = _activation_of(module), _weights_of(module, x_TD.dtype)
    by_expert = sort_assignments(top_k_index, len(weights["down_proj"]))
    with torch.autocast(x_TD.device.type, enabled=False):
        if not getattr(module, "has_post_expert_norm", False):
            out_TD = expert_layer(x_TD, top_k_weights, by_expert, weights, activation)
        else:
            y_ND = _whole_rows(expert_rows(x_TD, by_expert, weights, activation), by_expert)
            out_TD = combine(module.post_expert_norm(y_ND), top_k_weights, by_expert)
    return out_TD.to(hidden_states.dtype)


def _weights_of(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights by the names and in the layout of `expert_mlp`."""
    names = ["gate_up_proj" if _has_gate(module) else "up_proj", "down_proj"]
    if module.has_bias:
        names += [f"{name}_bias" for name in names]
    return prepare_weights({name: getattr(module, name) for name in names}, dtype, module.is_transposed)


def _activation_of(module: Any) -> Activation:
    """Our kernels' name of the activation, which they fuse with the products; else the module's own function.

    It is decided by classes, which `torch.compile` can trace, so that layers of one kind share a graph.
    """
    from transformers.activations import ACT2CLS
    from transformers.integrations.moe import _default_apply_gate

    kind = type(getattr(module, "act_fn", None))
    if not _has_gate(module):
        return next((name for name in ("gelu", "relu2") if kind is ACT2CLS[name]), module.act_fn)
    is_swiglu = type(module)._apply_gate is _default_apply_gate and kind in (nn.SiLU, ACT2CLS["silu"])
    return "swiglu" if is_swiglu else module._apply_gate


def _has_gate(module: Any) -> bool:
    # Before transformers 5.3 all experts have gates, and no such flag.
    return getattr(module, "has_gate", True)


def _whole_rows(y_ND: Tensor, by_expert: SortedAssignments) -> Tensor:
    """[N, D]: `y_ND` with zeros in the unassigned rows at its end, which may have any values or be missing."""
    unassigned_N = by_expert.assignment_R < 0
    if len(y_ND) < len(unassigned_N):
        y_ND = torch.cat([y_ND, y_ND.new_zeros(len(unassigned_N) - len(y_ND), y_ND.shape[1])])
    return y_ND.masked_fill(unassigned_N.unsqueeze(-1), 0.0)
