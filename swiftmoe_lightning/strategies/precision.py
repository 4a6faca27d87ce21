"""A precision plugin for gradients that are cut over the ranks, made of the Trainer's own or the user's."""

from __future__ import annotations

import copy
import types

from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.optim import Optimizer
from typing_extensions import override

from swiftmoe_lightning.engine import SwiftMoEEngine


class ShardedPrecision(Precision):
    """Clips gradients of which each rank holds a part. A plugin's own clipping, if it has any, goes before.

    Attributes:
        engine: of the module whose gradients they are.
    """

    engine: SwiftMoEEngine

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        if not self.engine.layers and self.engine.dense is None:
            # Nothing is cut: as under DDP, to the bit.
            super().clip_grad_by_norm(optimizer, clip_val)
        else:
            self.engine.clip_grad_norm_(clip_val, parameters=self.main_params(optimizer))

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.engine.clip_grad_value_(clip_val, parameters=self.main_params(optimizer))


def shard_precision(plugin: Precision, engine: SwiftMoEEngine) -> ShardedPrecision:
    """A plugin that does what `plugin` does, on gradients of which each rank holds a part.

    Args:
        plugin: stays as it is. One that this function returned goes on with another engine, and is returned.
        engine: of the module that is trained.

    Returns:
        A copy of `plugin`, of a class between its own and Lightning's `Precision`. Ranks skip a step together, where a
        scaler scales.
    """
    if isinstance(plugin, ShardedPrecision):
        sharded = plugin
    else:
        sharded = copy.copy(plugin)  # type: ignore[assignment]
        sharded.__class__ = _sharded_class(type(plugin))
    sharded.engine = engine
    if isinstance(sharded, MixedPrecision) and sharded.scaler is not None:
        sharded.scaler = engine.scaler_like(sharded.scaler, sharded.device)
    return sharded


def _sharded_class(kind: type[Precision]) -> type[ShardedPrecision]:
    """A subclass of `kind` and `ShardedPrecision`, under the name of `kind`: by it Lightning finds what a checkpoint
    holds of the plugin, which so goes on under other strategies."""
    bases = (ShardedPrecision,) if kind is Precision else (kind, ShardedPrecision)
    return types.new_class(
        kind.__name__,
        bases,
        exec_body=lambda body: body.update(__qualname__=kind.__qualname__, __module__=kind.__module__),
    )
