"""Registers `strategy="swiftmoe"` with the Trainer and Fabric, and an error with the fix with `pytorch_lightning`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from swiftmoe_lightning.strategies.fabric import SwiftMoEFabricStrategy
from swiftmoe_lightning.strategies.lightning import SwiftMoEStrategy

# Strategy name -> start method, as Lightning names those of DDP.
_START_METHODS: Final = {
    "swiftmoe": "popen",
    "swiftmoe_spawn": "spawn",
    "swiftmoe_fork": "fork",
    "swiftmoe_notebook": "fork",
}


class _WrongPackage:
    """Raises under `pytorch_lightning`, whose classes are not those of `lightning`."""

    def __init__(self, **_: Any) -> None:
        raise TypeError(
            "strategy='swiftmoe' works with the package `lightning`, and this Trainer is `pytorch_lightning`'s, a "
            "separate copy. Write `import lightning as L` and use L.Trainer and L.LightningModule throughout."
        )


def register() -> None:
    """Make `strategy="swiftmoe"`, "swiftmoe_spawn", ... known to Lightning's Trainer and to Fabric."""
    registries: list[tuple[Callable[..., Any], type]] = [
        (StrategyRegistry.register, SwiftMoEStrategy),
        (STRATEGY_REGISTRY.register, SwiftMoEFabricStrategy),
    ]
    if "pytorch_lightning" in sys.modules:
        registries.append((sys.modules["pytorch_lightning.strategies"].StrategyRegistry.register, _WrongPackage))
    for name, start_method in _START_METHODS.items():
        description = f"Data parallel, experts replicated by popularity anew every step, start_method {start_method!r}"
        for add, strategy in registries:
            add(name, strategy, description=description, override=True, start_method=start_method)
