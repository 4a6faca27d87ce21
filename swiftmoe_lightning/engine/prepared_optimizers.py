"""The optimizers that an engine has prepared: each updates this rank's rows, and ends a step of its layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Optimizer

from swiftmoe_lightning.engine.gradient_collector import GradientCollector
from swiftmoe_lightning.engine.muon_groups import connect_muon
from swiftmoe_lightning.engine.update import ShardedUpdate


class PreparedOptimizers:
    """The optimizers of one engine.

    Args:
        collector: of the engine, which refuses a step while gradients wait.
        end_step: called after every step, with its optimizer and the others.

    Attributes:
        updates: id of each optimizer -> its update.
    """

    def __init__(self, collector: GradientCollector, end_step: Callable[[Optimizer, list[Optimizer]], None]) -> None:
        self._collector, self._end_step = collector, end_step
        self.updates: dict[int, ShardedUpdate] = {}

    @property
    def bytes_sent(self) -> int:
        """Bytes that updates have sent from this rank to others since the start."""
        return sum(update.bytes_sent for update in self.updates.values())

    def add(self, optimizer: Optimizer, module: nn.Module, device: torch.device | None) -> None:
        """Prepare an optimizer, unless it is.

        Args:
            optimizer: of some of the module's parameters.
            module: the engine's.
            device: of its group; None on one rank.

        Raises:
            ValueError: when its update is neither elementwise nor that of `Muon`.
        """
        if id(optimizer) in self.updates:
            return
        optimizer.register_step_pre_hook(self._collector.refuse_step)
        connect_muon(optimizer, module, device)

        def name_of(parameter: nn.Parameter) -> str:
            return next((name for name, p in module.named_parameters() if p is parameter), "a parameter")

        def after_step() -> None:
            others = [update.optimizer for update in self.updates.values() if update.optimizer is not optimizer]
            self._end_step(optimizer, others)

        self.updates[id(optimizer)] = ShardedUpdate(optimizer, name_of, after_step)
