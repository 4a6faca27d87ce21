"""Hugging Face MoE models: their experts modules become ours, in place."""

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
    """Let `Experts` take the place of every experts module of a Hugging Face model.

    Experts modules are found by structure: fused tensors `gate_up_proj` or `up_proj` and `down_proj` of all experts,
    with or without biases, in either layout. Parameters stay the same objects with the same names, so optimizers and
    checkpoints know no difference; router, shared experts and losses are not touched. Repeatable.

    Args:
        model: any module that holds such experts modules.

    Returns:
        `model`, changed in place.

    Warns:
        UserWarning: once, of experts that stay as they are, with the reasons.

    Raises:
        ValueError: with the reasons when no experts could be taken over, or for what is no model.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"convert() takes a model, an nn.Module, got {model!r}. Load one first.")
    converted: dict[int, Experts] = {}
    left: dict[str, tuple[nn.Module, str]] = {}
    num_ours = 0
    for name, parent, key in _candidates(model):
        module = parent._modules[key]
        assert module is not None
        if isinstance(module, Experts):
            num_ours += 1
            continue
        try:
            # A module may have several places.
            converted[id(module)] = parent._modules[key] = converted.get(id(module)) or as_experts(module)
        except ValueError as error:
            left[name] = (module, str(error))
    if not converted and not num_ours:
        reasons = f":\n{_describe(left)}" if left else ", and nothing in it looks like experts."
        raise ValueError(f"convert() found no experts in {type(model).__name__} that it can take over{reasons}")
    if left:
        warnings.warn(f"convert() left these experts as they are:\n{_describe(left)}", stacklevel=2)
    return model


def _candidates(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, str]]:
    """(full name, parent, name in the parent) of what holds experts, ours or not, by structure or at least by name."""
    for key, child in list(module._modules.items()):
        if child is None:
            continue
        inner: nn.Module = child
        while (wrapped := inner._modules.get("base_layer")) is not None:
            # An adapter around experts is a candidate as a whole: what it wraps must not be changed under it.
            inner = wrapped
        own = {*inner._parameters, *inner._buffers}
        is_fused = "down_proj" in own and bool(own & {"gate_up_proj", "up_proj"}) and "gate_proj" not in own
        kind = type(child).__name__
        is_named = key == "experts" or (kind.endswith("Experts") and "Shared" not in kind)
        if isinstance(child, Experts) or is_fused or is_named:
            yield prefix + key, module, key
        else:
            yield from _candidates(child, f"{prefix}{key}.")


def _describe(left: dict[str, tuple[nn.Module, str]]) -> str:
    """One line for each reason, with the first module that it holds for."""
    names_of = defaultdict(list)
    for name, (module, reason) in left.items():
        names_of[type(module).__name__, reason].append(name)
    return "\n".join(
        f"  {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({kind}): {reason}"
        for (kind, reason), names in names_of.items()
    )
