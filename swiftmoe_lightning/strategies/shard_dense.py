"""dense="fsdp2" under Lightning's Trainer."""

from __future__ import annotations

from typing import Final

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.distributed.fsdp import register_fsdp_forward_method

from swiftmoe_lightning.engine import SwiftMoEEngine

_STEPS: Final = ("training_step", "validation_step", "test_step", "predict_step")


def shard_dense(trainer: Trainer, engine: SwiftMoEEngine) -> None:
    """Cut the dense part of the trainer's module over the ranks, and treat its steps like its forward. Repeatable.

    Raises:
        ValueError: for callbacks that have copied the module already.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            raise ValueError(
                f"{type(callback).__name__} copies the module before dense='fsdp2' cuts it, and the copy's parameters "
                "would not match. Use dense='ddp' with it."
            )
    engine.shard_dense()
    for step in _STEPS:
        # FSDP2 then gathers the root's weights for these steps as it does for forward, so that they can use them.
        if step not in vars(engine.module):
            register_fsdp_forward_method(engine.module, step)
