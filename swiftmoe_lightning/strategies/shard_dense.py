"""dense="fsdp2" under Lightning's Trainer."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch.distributed.fsdp import register_fsdp_forward_method

from swiftmoe_lightning.engine import SwiftMoEEngine


def shard_dense(trainer: Trainer, engine: SwiftMoEEngine) -> None:
    """Cut the dense part of the trainer's module over the ranks, and let training steps use it. Repeatable.

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
    if "training_step" not in vars(engine.module):
        # FSDP2 then gathers the root's weights for it as it does for forward, so that it can use them. Other steps find
        # all weights gathered; FSDP2 would cut them again where a step calls forward, after each batch.
        register_fsdp_forward_method(engine.module, "training_step")
