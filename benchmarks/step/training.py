"""One system's training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.step.workload import Model
from swiftmoe_lightning import SwiftMoEEngine
from swiftmoe_lightning.demo.gpt import next_byte_loss
from swiftmoe_lightning.distributed import phase

_NEVER: Final = 2**62


def _nothing() -> None:
    pass


@dataclass(eq=False, kw_only=True)
class TrainingSystem:
    """A model that a system has spread over the ranks, its optimizer, and one batch.

    Attributes:
        model: [B, T] int64 -> [B, T, V] logits.
        source: the model as it was before, which has the routes and the batch.
        optimizer: of this rank's parameters.
        engine: ours, if it trains the model.
        backward: from the loss, [], to all gradients.
        update: optimizer step, and what else the system does to gradients and weights; None steps the optimizer.
        check_routing: raises AssertionError if the last step's tokens did not go where they were told to.
    """

    model: nn.Module
    source: Model
    optimizer: Optimizer
    engine: SwiftMoEEngine | None = None
    backward: Callable[[Tensor], Any] = Tensor.backward
    update: Callable[[], Any] | None = None
    check_routing: Callable[[], None] = _nothing

    def forward(self) -> Tensor:
        """The loss on this rank's batch, []."""
        return next_byte_loss(self.model, self.source.batch_BT)

    def step(self) -> Tensor:
        """One training step: its loss, [], detached."""
        with phase("forward"):
            loss = self.forward()
        with phase("backward"):
            self.backward(loss)
        with phase("update"):
            (self.update or self.optimizer.step)()
            self.optimizer.zero_grad()
        return loss.detach()

    def restart_routes(self) -> None:
        """Route as in the first steps again."""
        for routes in self.source.routes:
            routes.restart()

    def wait_for_weights(self) -> None:
        """Wait until the experts' next weights have arrived, as the next forward would."""
        if self.engine is not None:
            self.engine.wait_for_weights()

    def set_adapting(self, every_step: bool) -> None:
        """Make a new placement in every step, or keep the present one."""
        assert self.engine is not None
        self.engine.config = replace(self.engine.config, replace_every=1 if every_step else _NEVER)
