"""Optimizers that were made before the engine: their groups go on with the sharded parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary


def parameter_names(module: nn.Module) -> WeakIdKeyDictionary:
    """The name of every parameter that the module has now, for as long as an optimizer keeps it alive."""
    return WeakIdKeyDictionary({parameter: name for name, parameter in module.named_parameters()})


def refuse_stepped(optimizer: Optimizer, fix: str) -> None:
    """Refuse an optimizer whose state is of whole experts already.

    Args:
        optimizer: made before the engine.
        fix: ends the message.

    Raises:
        ValueError: when it has stepped.
    """
    if any(_is_of_a_step(state) for state in optimizer.state.values()):
        raise ValueError(f"the optimizer has stepped already, and its state would not fit the experts' shards. {fix}")


def _is_of_a_step(state: dict[str, Any]) -> bool:
    """By its counter; without one (SGD's momentum) by values, as some optimizers allocate state where they are made."""
    if "step" in state:
        return int(state["step"]) > 0
    return any(isinstance(value, Tensor) and bool(value.count_nonzero()) for value in state.values())


def swap_parameters(optimizer: Optimizer, module: nn.Module, names: WeakIdKeyDictionary) -> None:
    """Let the optimizer's groups hold what the engine put in place of their parameters.

    Args:
        optimizer: changed in place, with its state.
        module: as the engine has left it.
        names: `parameter_names` the module before the engine; other parameters are left alone.
    """
    now = dict(module.named_parameters())
    for group in optimizer.param_groups:
        for i, parameter in enumerate(group["params"]):
            if parameter not in names:
                continue
            sharded = now[names[parameter]]
            group["params"][i] = sharded
            if sharded is not parameter and parameter in optimizer.state:
                optimizer.state[sharded] = optimizer.state.pop(parameter)
