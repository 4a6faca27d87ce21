"""Detects optimizers whose parameters are not, or no longer, the module's."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer


def refuse_foreign(optimizer: Optimizer, module: nn.Module) -> None:
    """Refuse an optimizer that has no parameter of the module; it may have others besides.

    Raises:
        ValueError: when not one of its parameters is the module's.
    """
    ids_of_module = {id(p) for p in module.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in ids_of_module for p in parameters):
        raise ValueError(
            f"none of the optimizer's {len(parameters)} parameters belongs to the engine's {type(module).__name__}, "
            "whose experts it would never update. Make it from module.parameters(), after the engine. "
            "(FAQ: other-parameters)"
        )


class StaleParameters:
    """Weak references to the parameters that sharded ones have replaced."""

    def __init__(self) -> None:
        self._refs: list[weakref.ref[nn.Parameter]] = []

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add parameters that have been replaced."""
        self._refs += [weakref.ref(p) for p in parameters]

    def held_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has one of them, which the module no longer uses."""
        ids = {id(p) for ref in self._refs if (p := ref()) is not None}
        return any(id(p) in ids for group in optimizer.param_groups for p in group["params"])


def refuse_replaced(optimizer: Optimizer, replaced: Mapping[str, StaleParameters]) -> None:
    """Refuse an optimizer that has parameters from before the engine.

    Args:
        optimizer: the optimizer.
        replaced: layer name -> the parameters that sharded ones replaced.

    Raises:
        ValueError: for such a one.
    """
    stale = [name for name, parameters in replaced.items() if parameters.held_by(optimizer)]
    if stale:
        raise ValueError(
            f"the optimizer holds parameters of {stale} from before the engine took them over. Make the engine "
            "first, then the optimizer from module.parameters(). (FAQ: other-parameters)"
        )


def refuse_uncut(optimizer: Optimizer, replaced: StaleParameters | None, dense: str) -> None:
    """Refuse an optimizer that has dense parameters from before they were cut.

    Args:
        optimizer: the optimizer.
        replaced: the parameters that the cut replaced; None before it.
        dense: the mode, for the message.

    Raises:
        ValueError: for such a one, and for any before the cut.
    """
    if replaced is None or replaced.held_by(optimizer):
        raise ValueError(
            f"the optimizer holds parameters from before dense={dense!r} cut them over the ranks. Call "
            "engine.data_parallel() first, then make the optimizer from module.parameters(). (FAQ: other-parameters)"
        )
