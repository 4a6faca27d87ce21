"""Detects optimizers whose parameters are not, or no longer, the module's."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

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
            "whose experts it would never update. Make it from module.parameters(), after the engine."
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
