"""Replaces the experts modules of Hugging Face models by `Experts`, in place."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from swiftmoe_lightning.huggingface.layouts import as_experts
from swiftmoe_lightning.modules.experts import Experts

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model) -> Model:
    """Replace every experts module of a Hugging Face model by an `Experts`.

    Experts modules are found by structure: fused tensors `gate_up_proj` or `up_proj` and `down_proj` of all experts,
    with or without biases, in either layout. Parameters stay the same objects with the same names, so optimizers and
    checkpoints stay valid; router, shared experts and losses are not touched. Repeatable.

    PEFT's LoRA of these tensors (`target_parameters`) is taken over: its factors become new parameters of the
    `Experts`, so make the optimizer afterwards. PEFT saves and loads the adapter as before.

    Args:
        model: any module that holds such experts modules.

    Returns:
        `model`, changed in place.

    Warns:
        UserWarning: once, with the experts that stay as they are and the reasons.

    Raises:
        ValueError: with the reasons when no experts could be converted, or for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"convert() takes a model, an nn.Module, got {model!r}. Load one first.")
    converted: dict[int, Experts] = {}
    unconverted: dict[str, tuple[nn.Module, str]] = {}
    num_ours = 0
    for name, parent, key in _candidates(model):
        module = parent._modules[key]
        assert module is not None
        if isinstance(module, Experts):
            num_ours += 1
            continue
        try:
            # A module that stands in several places is converted once.
            converted[id(module)] = parent._modules[key] = converted.get(id(module)) or _take_over(module)
        except ValueError as error:
            unconverted[name] = (module, str(error))
    if not converted and not num_ours:
        reasons = f":\n{_describe(unconverted)}" if unconverted else ", and nothing in it looks like experts."
        raise ValueError(
            f"convert() found no experts in {type(model).__name__} that it can take over{reasons} (FAQ: not-converted)"
        )
    if unconverted:
        warnings.warn(
            f"convert() left these experts as they are:\n{_describe(unconverted)} (FAQ: not-converted)", stacklevel=2
        )
    return model


def _take_over(module: nn.Module) -> Experts:
    if (type(module).__module__, type(module).__name__) == ("peft.tuners.lora.layer", "ParamWrapper"):
        from swiftmoe_lightning.huggingface.peft_adapters import unwrap_adapters

        return unwrap_adapters(module)
    return as_experts(module)


def _candidates(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, parent, name in the parent) of every module that is experts by its structure or by its name."""
    for key, child in list(module._modules.items()):
        if child is None:
            continue
        inner: nn.Module = child
        while (wrapped := inner._modules.get("base_layer")) is not None:
            # An adapter around experts is one candidate: the experts inside must not be replaced alone.
            inner = wrapped
        tensors = {*inner._parameters, *inner._buffers}
        has_up = bool(tensors & {"gate_up_proj", "up_proj"})
        is_fused = "down_proj" in tensors and has_up and "gate_proj" not in tensors
        kind = type(child).__name__
        is_named = key == "experts" or (kind.endswith("Experts") and "Shared" not in kind)
        if isinstance(child, Experts) or is_fused or is_named:
            yield prefix + key, module, key
        else:
            yield from _candidates(child, f"{prefix}{key}.")


def _describe(unconverted: dict[str, tuple[nn.Module, str]]) -> str:
    """One line for each reason, with the first module that it holds for."""
    names_of = defaultdict(list)
    for name, (module, reason) in unconverted.items():
        names_of[type(module).__name__, reason].append(name)
    return "\n".join(
        f"  {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({kind}): {reason}"
        for (kind, reason), names in names_of.items()
    )
