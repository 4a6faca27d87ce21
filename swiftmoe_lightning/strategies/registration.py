"""Registers `strategy="swiftmoe"` with the Trainer and Fabric, and an error with the fix with `pytorch_lightning`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from swiftmoe_lightning.strategies.fabric import SwiftMoEFabricStrategy
from swiftmoe_lightning.strategies.lightning import SwiftMoEStrategy


class _WrongPackage:
    """Raises under `pytorch_lightning`, whose classes are not those of `lightning`."""

    def __init__(self, **_: Any) -> None:
        raise TypeError(
            "strategy='swiftmoe' works with the package `lightning`, and this Trainer is `pytorch_lightning`'s, a "
            "separate copy. Write `import lightning as L` and use L.Trainer and L.LightningModule throughout."
        )


def register() -> None:
    """Make `strategy="swiftmoe"` known to Lightning's Trainer and to Fabric."""
    description = "Data parallel, with experts replicated by popularity anew every step"
    StrategyRegistry.register("swiftmoe", SwiftMoEStrategy, description=description, override=True)
    STRATEGY_REGISTRY.register("swiftmoe", SwiftMoEFabricStrategy, description=description, override=True)
    if "pytorch_lightning" in sys.modules:
        registry: Callable[..., Any] = sys.modules["pytorch_lightning.strategies"].StrategyRegistry.register
        registry("swiftmoe", _WrongPackage, description=description, override=True)
