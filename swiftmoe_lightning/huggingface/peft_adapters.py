"""PEFT's LoRA of experts: its wrappers become factors in `Experts`, which PEFT saves and loads as its own.

PEFT lays the factors of all experts side by side: `lora_A.weight [r * E, in]`, one expert after the other, and
`lora_B.weight [out, r * E]`, in which an expert has every E-th column. Which dim of the experts' tensor is "in" depends
on PEFT's version and on the module. E experts, r rank.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import peft
import peft.peft_model
import peft.utils.save_and_load
from packaging.version import Version
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
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
        adapter: PEFT's name of the adapter.
        prefix: of its key, behind the name of the experts: one "base_layer." for each wrapper outside of its own.
        is_A: whether it is PEFT's A.
        is_crossed: whether PEFT's "in" is the outputs of the experts' matrix.
    """

    adapter: str
    prefix: str
    is_A: bool
    is_crossed: bool

    @property
    def key(self) -> str:
        """As PEFT writes it to a file, without the adapter's name."""
        return f"{self.prefix}lora_{'A' if self.is_A else 'B'}.weight"

    @property
    def key_in_model(self) -> str:
        """As PEFT has it in the state of a model."""
        return f"{self.key.removesuffix('weight')}{self.adapter}.weight"

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


class PeftAdapter(nn.Module, LoraLayer):
    """Stands in `Experts` for PEFT's wrappers: PEFT switches adapters by it, and keys of PEFT's are loaded.

    Args:
        experts: with the factors.
        factors: name of a parameter of `experts` -> what it is to PEFT.
        active: names of PEFT's active adapters.
    """

    # PEFT's methods find no factors of its own layout here.
    adapter_layer_names = other_param_names = ()

    def __init__(self, experts: Experts, factors: dict[str, _Factor], active: list[str]) -> None:
        # Not of PEFT's layer, which is around another.
        nn.Module.__init__(self)
        self.factors, self._active_adapter = factors, active
        # Whose keys have no adapter's name in them: that which PEFT loads (from 0.21 on), or the first.
        self.loads = next(iter(experts.adapters.scales))
        self._adapters, self._num_experts = experts.adapters, experts.num_experts
        # Called, and not kept: the module would be its own child.
        self._parameters_of_experts = experts.expert_parameters
        self._adapters.active = self._the_one(active)
        experts.register_load_state_dict_pre_hook(self._take_keys)

    def _the_one(self, active: list[str]) -> str | None:
        own = [name for name in active if name in self._adapters.scales]
        if len(own) > 1:
            raise ValueError(
                f"the adapters {own} are active, and experts compute one: model.set_adapter() one of them, or merge "
                "them in PEFT's own model before convert(). (FAQ: lora-on-experts)"
            )
        return own[0] if own else None

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's layers: `with model.disable_adapter()` calls it. What is trained stays as it is."""
        self._disable_adapters = not enabled
        self._adapters.enabled = enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's layers: compute this adapter, and train it alone unless it is for inference.

        Args:
            adapter_names: one, or several of which experts have one.
            inference_mode: whether it is not trained.

        Raises:
            ValueError: when the experts have several of them.
        """
        active = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._adapters.active = self._the_one(active)
        self._active_adapter = active
        for name, parameter in self._factors_of_experts():
            parameter.requires_grad_(self.factors[name].adapter in active and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's layers: train these adapters, or do not.

        Args:
            adapter_names: one, or several.
            requires_grad: whether they are trained.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, parameter in self._factors_of_experts():
            if self.factors[name].adapter in names:
                parameter.requires_grad_(requires_grad)

    def _factors_of_experts(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._parameters_of_experts().items() if name in self.factors]

    @property
    def lora_A(self) -> Any:
        """What PEFT reads where each row of a batch has an adapter of its own (`adapter_names=`).

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "experts that convert() has taken over compute one adapter for all rows, and adapter_names= gives rows "
            "their own. Call model.set_adapter() and pass the rows of one adapter at a time, or do not convert(). "
            "(FAQ: lora-on-experts)"
        )

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
            keys = [factor.key_in_model, factor.key] if factor.adapter == self.loads else [factor.key_in_model]
            for key in keys:
                weight = state.pop(prefix + key, None)
                if weight is not None:
                    state[prefix + name] = factor.from_peft(weight, self._num_experts)

    def add_to(self, saved: dict[str, Tensor], adapter: str, state: dict[str, Tensor], prefix: str) -> None:
        """Add an adapter's factors to what PEFT saves. A collective if they are sharded.

        Args:
            saved: changed in place.
            adapter: its name.
            state: of the model.
            prefix: of the experts' names.
        """
        for name, factor in self.factors.items():
            # PEFT takes names with "lora_" in them for its own.
            saved.pop(prefix + name, None)
            if factor.adapter == adapter:
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
        raise ValueError("they have adapters already, which convert() has taken over: add all of them before it")
    experts.adapters.scales = {adapter: {} for layer in reversed(wrappers) for adapter in layer.lora_A}
    factors: dict[str, _Factor] = {}
    for depth, layer in enumerate(wrappers):
        prefix = "base_layer." * depth
        # Before 0.19 PEFT did not swap dims.
        is_crossed = getattr(layer, "_did_swap_in_out_features", False) == experts.transposed
        sides = list(zip("AB", "BA" if is_crossed else "AB", strict=True))
        for adapter, (own, theirs) in itertools.product(layer.lora_A, sides):
            weight = getattr(layer, f"lora_{theirs}")[adapter].weight
            factor = _Factor(adapter, prefix, theirs == "A", is_crossed)
            name = f"{experts.adapters.stem(adapter, layer.parameter_name)}_lora_{own}"
            value = factor.from_peft(weight.detach(), experts.num_experts)
            experts.register_parameter(name, nn.Parameter(value, requires_grad=weight.requires_grad))
            factors[name] = factor
            experts.adapters.scales[adapter][layer.parameter_name] = layer.scaling[adapter]
        experts.adapters.enabled = not layer.disable_adapters
    experts.peft_adapter = PeftAdapter(experts, factors, wrappers[0].active_adapters)
    _connect_to_peft()
    return experts


def _check_wrapper(layer: ParamWrapper) -> None:
    if Version(peft.__version__) < _PEFT_FROM:
        raise ValueError(f"PEFT {peft.__version__} lays out their adapter in another way: pip install 'peft>=0.20'")
    if layer.parameter_name not in _ADAPTED:
        raise ValueError(f"{layer.parameter_name} has an adapter: target_parameters can be {', '.join(_ADAPTED)}")
    if layer.merged:
        raise ValueError("their adapter is merged: model.unmerge_adapter() before convert()")


def _connect_to_peft() -> None:
    """Let PEFT, for the rest of the process, find the factors of `Experts` when it saves and loads an adapter."""
    functions = peft.utils.save_and_load
    if hasattr(functions.get_peft_model_state_dict, "_swiftmoe"):
        return
    get_state, set_state = (
        _with_experts(functions.get_peft_model_state_dict),
        _for_adapter(functions.set_peft_model_state_dict),
    )
    for module in (peft, peft.peft_model, peft.utils, functions):
        module.get_peft_model_state_dict, module.set_peft_model_state_dict = get_state, set_state


def _adapters_in(model: nn.Module) -> Iterator[tuple[str, PeftAdapter]]:
    """(prefix of the experts' names, their adapter)."""
    for name, experts in model.named_modules():
        adapter = experts._modules.get("peft_adapter") if isinstance(experts, Experts) else None
        if isinstance(adapter, PeftAdapter):
            yield f"{name}." if name else "", adapter


def _with_experts(get_state: Any) -> Any:
    signature = inspect.signature(get_state)

    @functools.wraps(get_state)
    def get_peft_model_state_dict(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        model = bound.arguments["model"]
        if bound.arguments["state_dict"] is None:
            bound.arguments["state_dict"] = model.state_dict()
        saved: dict[str, Tensor] = get_state(*bound.args, **bound.kwargs)
        for prefix, adapter in _adapters_in(model):
            adapter.add_to(saved, bound.arguments["adapter_name"], bound.arguments["state_dict"], prefix)
        return saved

    get_peft_model_state_dict._swiftmoe = True  # type: ignore[attr-defined]
    return get_peft_model_state_dict


def _for_adapter(set_state: Any) -> Any:
    signature = inspect.signature(set_state)

    @functools.wraps(set_state)
    def set_peft_model_state_dict(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        before = [(adapter, adapter.loads) for _, adapter in _adapters_in(bound.arguments["model"])]
        for adapter, _ in before:
            adapter.loads = bound.arguments["adapter_name"]
        try:
            return set_state(*bound.args, **bound.kwargs)
        finally:
            for adapter, loads in before:
                adapter.loads = loads

    return set_peft_model_state_dict
