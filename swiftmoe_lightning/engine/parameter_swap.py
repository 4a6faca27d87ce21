"""Puts sharded parameters into optimizers that were made before the engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary


def parameter_names(module: nn.Module) -> WeakIdKeyDictionary:
    """Parameter -> its name in the module, in a weak dict: an entry goes when its parameter is freed."""
    return WeakIdKeyDictionary({parameter: name for name, parameter in module.named_parameters()})


def refuse_stepped(optimizer: Optimizer, fix: str) -> None:
    """Refuse an optimizer that has stepped, and so has state of whole experts.

    Args:
        optimizer: made before the engine.
        fix: the last sentence of the message.

    Raises:
        ValueError: when it has stepped.
    """
    if any(_is_of_a_step(state) for state in optimizer.state.values()):
        raise ValueError(f"the optimizer has stepped already, and its state would not fit the experts' shards. {fix}")


def _is_of_a_step(state: dict[str, Any]) -> bool:
    """Whether a step wrote this state: by its counter or, without one (SGD's momentum), by values other than zero.

    Some optimizers allocate state in their constructor."""
    if "step" in state:
        return int(state["step"]) > 0
    return any(isinstance(value, Tensor) and bool(value.count_nonzero()) for value in state.values())


def swap_parameters(optimizer: Optimizer, module: nn.Module, names: WeakIdKeyDictionary) -> None:
    """Replace, in the optimizer's groups and state, parameters by those that the engine made of them.

    Args:
        optimizer: changed in place, with its state.
        module: after the engine was made.
        names: `parameter_names` of the module before that. Other parameters stay as they are.
    """
    current = dict(module.named_parameters())
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter not in names:
                continue
            sharded = current[names[parameter]]
            group["params"][i] = sharded
            if sharded is not parameter and parameter in optimizer.state:
                optimizer.state[sharded] = optimizer.state.pop(parameter)
