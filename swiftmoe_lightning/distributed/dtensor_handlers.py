"""Replaces what single operators do with DTensors, for the rest of the process. Handlers run below autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.distributed.tensor import DTensor

Handler: TypeAlias = Callable[[torch._ops.OpOverload, tuple[Any, ...], dict[str, Any]], Any]


def handle(handler: Handler, *operators: torch._ops.OpOverload) -> None:
    """Run `handler(operator, args, kwargs)` in place of these operators wherever an argument is a DTensor."""
    for operator in operators:
        _handlers()[operator] = handler


def by_default(operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the operator as if it had no handler. For use inside of handlers."""
    handler = _handlers().pop(operator, None)
    try:
        return operator(*args, **kwargs)
    finally:
        if handler is not None:
            _handlers()[operator] = handler


def _handlers() -> dict[torch._ops.OpOverload, Handler]:
    handlers: Any = DTensor._op_dispatcher._custom_op_handlers
    return handlers
