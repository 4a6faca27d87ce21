"""Registers `strategy="swiftmoe"` with the Trainer and Fabric, and an error with the fix with `pytorch_lightning`."""

from __future__ import annotations

import sys
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
    """Make `strategy="swiftmoe"` known to Lightning's Trainer and to Fabric, and each name that they have for DDP:
    "swiftmoe_spawn", "swiftmoe_notebook", "swiftmoe_find_unused_parameters_true", ...
    """
    registries: list[tuple[Any, type]] = [
        (StrategyRegistry, SwiftMoEStrategy),
        (STRATEGY_REGISTRY, SwiftMoEFabricStrategy),
    ]
    if "pytorch_lightning" in sys.modules:
        registries.append((sys.modules["pytorch_lightning.strategies"].StrategyRegistry, _WrongPackage))
    for registry, strategy in registries:
        of_ddp = {name: entry for name, entry in registry.items() if entry["strategy"].__name__ == "DDPStrategy"}
        for name, entry in of_ddp.items():
            registry.register(
                name.replace("ddp", "swiftmoe", 1),
                strategy,
                description=f"As {name!r}, with experts replicated by popularity anew every step",
                override=True,
                **entry["init_params"],
            )
