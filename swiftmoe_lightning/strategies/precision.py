"""A precision plugin for gradients that are cut over the ranks, derived from the Trainer's or the user's plugin."""

from __future__ import annotations

import copy
import types

from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch.optim import Optimizer
from typing_extensions import override

from swiftmoe_lightning.engine import SwiftMoEEngine


class ShardedPrecision(Precision):
    """Clips gradients of which each rank has a part. Clipping that the user's plugin overrides takes precedence.

    Attributes:
        engine: of the module whose gradients they are.
    """

    engine: SwiftMoEEngine

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        if not self.engine.layers and self.engine.dense is None:
            # Nothing is sharded: this is what DDP does, to the bit.
            super().clip_grad_by_norm(optimizer, clip_val)
        else:
            self.engine.clip_grad_norm_(clip_val, parameters=self.main_params(optimizer))

    @override
    def clip_grad_by_value(self, optimizer: Optimizer, clip_val: int | float) -> None:
        self.engine.clip_grad_value_(clip_val, parameters=self.main_params(optimizer))


def shard_precision(plugin: Precision, engine: SwiftMoEEngine) -> ShardedPrecision:
    """A plugin like `plugin`, for gradients of which each rank has a part.

    Args:
        plugin: it is not changed, unless this function made it: then it is returned, with the new engine.
        engine: of the module that is trained.

    Returns:
        A copy of `plugin`, whose class derives from that of `plugin`. With a scaler, ranks skip a step together.
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
    """A subclass of `kind` and `ShardedPrecision`, named as `kind`: Lightning saves a plugin's state under the name of
    its class, and other strategies are to find it there."""
    bases = (ShardedPrecision,) if kind is Precision else (kind, ShardedPrecision)
    return types.new_class(
        kind.__name__,
        bases,
        exec_body=lambda body: body.update(__qualname__=kind.__qualname__, __module__=kind.__module__),
    )
