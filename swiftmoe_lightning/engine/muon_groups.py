"""Which parameters of a model Muon updates, and how the matrices lie in those of experts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from swiftmoe_lightning.engine.muon import Muon
from swiftmoe_lightning.modules import Experts
from swiftmoe_lightning.ops import Activation, is_factor

# The hidden dim of a trial of a gated activation.
_TRIAL_F = 4


def muon_groups(module: nn.Module, adamw: Iterable[str] = (), **adamw_options: Any) -> list[dict[str, Any]]:
    """Parameter groups of `Muon` for a whole model, of the parameters that require gradients.

    Muon gets the weights of `Experts`, each of gate, up and down by itself, and the 2-D weights of other modules. AdamW
    gets what is no matrix of a hidden layer: vectors, biases (those of experts are 2-D), embeddings, the head that a
    transformers model names by `get_output_embeddings()`, factors of LoRA, and what `adamw` names.

    Args:
        module: before or after an engine took it over.
        adamw: names of other modules or parameters that AdamW is to update, as "lm_head" or "blocks.0.router": of one
            part of a parameter's dotted name, or several in a row.
        **adamw_options: of AdamW's group: lr, betas, eps, weight_decay.

    Returns:
        Groups for `Muon(...)`; add other options to them as you like.

    Raises:
        ValueError: for a name in `adamw` that fits no parameter, or experts whose gate and up cannot be told apart.
    """
    names = [adamw] if isinstance(adamw, str) else [*adamw]
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    unknown = [part for part in names if not any(_is_in(part, name) for name in named)]
    if unknown:
        raise ValueError(f"adamw names {unknown}, and no parameter that trains has it in its name: {[*named]}.")
    layouts = layouts_of(part for part in module.modules() if isinstance(part, Experts))
    not_hidden = _embeddings_and_heads(module)
    groups: dict[tuple[str | None, bool], list[nn.Parameter]] = {}
    rest = []
    for name, parameter in named.items():
        by_name = any(_is_in(part, name) for part in names)
        if by_name or parameter in not_hidden or parameter.dim() < 2:
            rest.append(parameter)
        elif parameter not in layouts:
            if parameter.dim() == 2:
                groups.setdefault((None, False), []).append(parameter)
            else:
                rest.append(parameter)
        elif parameter.dim() == 2 or is_factor(name):
            rest.append(parameter)
        else:
            layout, transposed = layouts[parameter]
            if layout is None:
                raise ValueError(
                    f"the activation of {name!r} does not show which of its rows are the gate's and which are up's. "
                    "Make a group of it with experts='halves', 'interleaved' or 'matrix' by hand, or name it in adamw. "
                    "(FAQ: muon-on-experts)"
                )
            groups.setdefault((layout, transposed), []).append(parameter)
    made: list[dict[str, Any]] = [
        {"params": parameters, "use_muon": True, "experts": layout, "transposed": transposed}
        for (layout, transposed), parameters in groups.items()
    ]
    return [*made, {"params": rest, "use_muon": False, **adamw_options}]


def _is_in(part: str, name: str) -> bool:
    return f".{part}." in f".{name}."


def _embeddings_and_heads(module: nn.Module) -> set[Tensor]:
    found: list[Any] = []
    for part in module.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            found.append(part)
        elif callable(name_head := getattr(part, "get_output_embeddings", None)):
            found.append(name_head())
    return {part.weight for part in found if part is not None}


def layouts_of(layers: Iterable[Experts]) -> dict[Tensor, tuple[str | None, bool]]:
    """Parameter of experts -> its `experts` and `transposed` in a group of `Muon`'s; None where the first is not seen.

    Args:
        layers: of a model.
    """
    layouts: dict[Tensor, tuple[str | None, bool]] = {}
    for experts in layers:
        for name, parameter in experts.expert_parameters().items():
            layout = gate_layout(experts.activation) if name == "gate_up_proj" else "matrix"
            layouts[parameter] = layout, experts.transposed and not is_factor(name)
    return layouts


def gate_layout(activation: Activation) -> str | None:
    """How gate and up lie in the input of a gated activation: "halves", "interleaved", or None where neither is seen.

    A function is tried: the n-th of F outputs depends on the inputs n and F + n, or 2n and 2n + 1.

    Args:
        activation: "swiglu", or a function [R, 2F] -> [R, F].
    """
    if isinstance(activation, str):
        return "halves"
    with torch.device("cpu"), torch.enable_grad():
        # Small, where no clamp cuts the gradient off.
        z_RF = torch.linspace(0.1, 0.5, 2 * _TRIAL_F, dtype=torch.float32)[None].requires_grad_()
        try:
            jacobian = torch.autograd.functional.jacobian(activation, z_RF)
        except Exception:
            return None
    if jacobian.shape != (1, _TRIAL_F, 1, 2 * _TRIAL_F):
        return None
    depends_F2F = jacobian[0, :, 0].ne(0)
    output_F = torch.arange(_TRIAL_F)
    halves = (output_F, output_F + _TRIAL_F)
    for layout, (gate_F, up_F) in {"halves": halves, "interleaved": (2 * output_F, 2 * output_F + 1)}.items():
        expected_F2F = torch.zeros_like(depends_F2F)
        expected_F2F[output_F, gate_F] = expected_F2F[output_F, up_F] = True
        if torch.equal(depends_F2F, expected_F2F):
            return layout
    return None


def connect_muon(optimizer: Optimizer, module: nn.Module, device: torch.device | None) -> None:
    """Let a `Muon` refuse groups that do not say how experts' matrices lie, now and when groups are added.

    Args:
        optimizer: others stay as they are.
        module: whose experts it may update.
        device: where matrices are orthogonalised; None leaves them where they are.

    Raises:
        ValueError: for such a group.
    """
    if not isinstance(optimizer, Muon):
        return

    def check(group: dict[str, Any]) -> None:
        if not group["use_muon"]:
            return
        layouts = layouts_of(part for part in module.modules() if isinstance(part, Experts))
        for parameter in group["params"]:
            layout, transposed = layouts.get(parameter, (None, False))
            is_bias = parameter in layouts and parameter.dim() == 2
            if is_bias or (layout is not None and (layout, transposed) != (group["experts"], group["transposed"])):
                needed = "use_muon=False" if is_bias else f"experts={layout!r}, transposed={transposed}"
                name = next(name for name, p in module.named_parameters() if p is parameter)
                raise ValueError(
                    f"{name!r}, of shape {list(parameter.shape)}, is in a group of Muon's with "
                    f"experts={group['experts']!r}, transposed={group['transposed']}, and needs {needed}: it would be "
                    "orthogonalised as other matrices than it holds. Make the groups by sml.muon_groups(model). "
                    "(FAQ: muon-on-experts)"
                )

    for group in optimizer.param_groups:
        check(group)
    optimizer.check_group, optimizer.compute_device = check, device
