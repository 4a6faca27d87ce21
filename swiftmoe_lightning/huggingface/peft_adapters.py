"""PEFT's LoRA of experts: its wrappers become factors in `Experts`, which PEFT saves and loads as its own.

PEFT lays the factors of all experts side by side: `lora_A.weight [r * E, in]`, one expert after the other, and
`lora_B.weight [out, r * E]`, in which an expert has every E-th column. Which dim of the experts' tensor is "in" depends
on PEFT's version and on the module. E experts, r rank.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Final

import peft
import peft.peft_model
import peft.utils.save_and_load
from packaging.version import Version
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from swiftmoe_lightning.distributed import full_tensor
from swiftmoe_lightning.huggingface.layouts import as_experts
from swiftmoe_lightning.modules.experts import Experts

# The first that lays them out so.
_PEFT_FROM: Final = Version("0.19")
_ADAPTED: Final = ("gate_up_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class _Factor:
    """Where PEFT has a factor of `Experts`, and how.

    Attributes:
        prefix: of its key, behind the name of the experts: one "base_layer." for each wrapper outside of its own.
        is_A: whether it is PEFT's A.
        is_crossed: whether PEFT's "in" is the outputs of the experts' matrix.
    """

    prefix: str
    is_A: bool
    is_crossed: bool

    @property
    def key(self) -> str:
        """As PEFT writes it to a file, without the adapter's name."""
        return f"{self.prefix}lora_{'A' if self.is_A else 'B'}.weight"

    def key_of(self, adapter: str) -> str:
        """As PEFT has it in the state of a model."""
        return f"{self.key.removesuffix('weight')}{adapter}.weight"

    def from_peft(self, weight: Tensor, num_experts: int) -> Tensor:
        """[r * E, in] or [out, r * E] -> [E, r, in] or [E, out, r]."""
        if self.is_A:
            factor = weight.unflatten(0, (num_experts, -1))
        else:
            factor = weight.unflatten(1, (-1, num_experts)).permute(2, 0, 1)
        return (factor.transpose(1, 2) if self.is_crossed else factor).contiguous()

    def to_peft(self, factor: Tensor) -> Tensor:
        """The reverse of `from_peft`."""
        factor = factor.transpose(1, 2) if self.is_crossed else factor
        return (factor.flatten(0, 1) if self.is_A else factor.permute(1, 2, 0).flatten(1)).contiguous()


class PeftAdapter(nn.Module, BaseTunerLayer):
    """Stands in `Experts` for PEFT's wrappers: PEFT switches the adapter by it, and keys of PEFT's are loaded.

    Args:
        experts: with the factors.
        name: of the adapter.
        factors: name of a parameter of `experts` -> what it is to PEFT.
    """

    def __init__(self, experts: Experts, name: str, factors: dict[str, _Factor]) -> None:
        super().__init__()
        self.name, self.factors = name, factors
        self._adapters, self._num_experts = experts.adapters, experts.num_experts
        experts.register_load_state_dict_pre_hook(self._take_keys)

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's layers: `with model.disable_adapter()` calls it."""
        super().enable_adapters(enabled)
        self._adapters.enabled = enabled

    def unload_and_optionally_merge_module(self, *_: Any, **__: Any) -> None:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "an adapter of experts that convert() has taken over cannot be merged, unloaded or deleted. Save it by "
            "model.save_pretrained(folder), then in a new process PeftModel.from_pretrained(base, folder)"
            ".merge_and_unload(). (FAQ: lora-on-experts)"
        )

    merge = unmerge = delete_adapter = unload_and_optionally_merge_module

    def _take_keys(self, _: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name, factor in self.factors.items():
            # PEFT from 0.21 on gives its own layers' keys alone an adapter's name.
            for key in (factor.key, factor.key_of(self.name)):
                weight = state.pop(prefix + key, None)
                if weight is not None:
                    state[prefix + name] = factor.from_peft(weight, self._num_experts)

    def add_to(self, saved: dict[str, Tensor], state: dict[str, Tensor], prefix: str) -> None:
        """Add the factors to what PEFT saves. A collective if they are sharded.

        Args:
            saved: changed in place.
            state: of the model.
            prefix: of the experts' names.
        """
        for name, factor in self.factors.items():
            saved[prefix + factor.key] = factor.to_peft(full_tensor(state[prefix + name]))


def unwrap_adapters(wrapper: nn.Module) -> Experts:
    """An `Experts` that computes what PEFT's wrapper(s) around experts do, whose weights stay as they are, frozen.

    Args:
        wrapper: the outermost.

    Raises:
        ValueError: with the reason when there is no such `Experts`.
    """
    wrappers: list[ParamWrapper] = []
    inner: Any = wrapper
    while "base_layer" in inner._modules:
        _check_wrapper(inner)
        wrappers.append(inner)
        inner = inner.base_layer
    experts = inner if isinstance(inner, Experts) else as_experts(inner)
    if experts.adapters.scales:
        raise ValueError("they have an adapter already, which convert() has taken over, and can have one")
    (adapter,) = wrappers[0].lora_A
    factors: dict[str, _Factor] = {}
    for depth, layer in enumerate(wrappers):
        prefix = "base_layer." * depth
        # Before 0.19 PEFT did not swap dims.
        is_crossed = getattr(layer, "_did_swap_in_out_features", False) == experts.transposed
        for own, theirs in zip("AB", "BA" if is_crossed else "AB", strict=True):
            weight = getattr(layer, f"lora_{theirs}")[adapter].weight
            name, factor = f"{layer.parameter_name}_lora_{own}", _Factor(prefix, theirs == "A", is_crossed)
            value = factor.from_peft(weight.detach(), experts.num_experts)
            experts.register_parameter(name, nn.Parameter(value, requires_grad=weight.requires_grad))
            factors[name] = factor
        experts.adapters.scales[layer.parameter_name] = layer.scaling[adapter]
        experts.adapters.enabled = not layer.disable_adapters and adapter in layer.active_adapters
    experts.peft_adapter = PeftAdapter(experts, adapter, factors)
    _let_peft_save()
    return experts


def _check_wrapper(layer: ParamWrapper) -> None:
    if Version(peft.__version__) < _PEFT_FROM:
        raise ValueError(f"PEFT {peft.__version__} lays out their adapter in another way: pip install 'peft>=0.20'")
    if layer.parameter_name not in _ADAPTED:
        raise ValueError(f"{layer.parameter_name} has an adapter: target_parameters can be {', '.join(_ADAPTED)}")
    if len(layer.lora_A) != 1:
        raise ValueError(f"they have the adapters {sorted(layer.lora_A)}: keep one, model.delete_adapter() the others")
    if layer.merged:
        raise ValueError("their adapter is merged: model.unmerge_adapter() before convert()")


def _let_peft_save() -> None:
    """Let PEFT, for the rest of the process, find the factors of `Experts` among what it saves."""
    get_state = peft.utils.save_and_load.get_peft_model_state_dict
    if hasattr(get_state, "_swiftmoe"):
        return
    for module in (peft, peft.peft_model, peft.utils, peft.utils.save_and_load):
        module.get_peft_model_state_dict = _with_experts(get_state)


def _with_experts(get_state: Any) -> Any:
    signature = inspect.signature(get_state)

    @functools.wraps(get_state)
    def get_peft_model_state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        model = bound.arguments["model"]
        if bound.arguments["state_dict"] is None:
            bound.arguments["state_dict"] = model.state_dict()
        state = bound.arguments["state_dict"]
        saved: dict[str, Tensor] = get_state(*bound.args, **bound.kwargs)
        for name, experts in model.named_modules():
            adapter = experts._modules.get("peft_adapter") if isinstance(experts, Experts) else None
            if isinstance(adapter, PeftAdapter):
                prefix = f"{name}." if name else ""
                for own in adapter.factors:
                    # PEFT takes names with "lora_" in them for its own.
                    saved.pop(prefix + own, None)
                if adapter.name == bound.arguments["adapter_name"]:
                    adapter.add_to(saved, state, prefix)
        return saved

    get_peft_model_state_dict._swiftmoe = True  # type: ignore[attr-defined]
    return get_peft_model_state_dict
