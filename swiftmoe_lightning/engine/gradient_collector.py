"""Phase 1 of a step: decides when the gradients that backward leaves in the slots are collected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from swiftmoe_lightning.distributed import is_sharded
from swiftmoe_lightning.engine.sharded_layer import ShardedLayer
from swiftmoe_lightning.engine.weight_exchange import PendingCollection
from swiftmoe_lightning.modules import in_backward


class GradientCollector:
    """Collects gradients in every backward outside of `no_sync()`, also after backwards that failed.

    A layer's gradients leave its slots as soon as backward has added all that it will, and travel while it computes
    those of the layers below; the last are waited for at its end. Autograd runs equal graphs in the same order, so all
    ranks send the layers' gradients in one order; what is left at the end goes in the order of the module.

    Autograd drops the callbacks of a backward that raises. So backwards are told apart by autograd's number: one that
    failed is never taken for one that is still running. Reentrant activation checkpointing runs backwards inside a
    backward; each of them has its own number and its own end.

    Attributes:
        syncs: whether the next backward collects; `no_sync()` sets it, too.
    """

    def __init__(self) -> None:
        self.syncs = True
        self._running: dict[int, dict[ShardedLayer, None]] = {}
        self._waiting: dict[ShardedLayer, None] = {}
        self._under_way: list[tuple[ShardedLayer, PendingCollection]] = []
        self._collected: dict[ShardedLayer, None] = {}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward leaves gradients in the slots."""
        previous, self.syncs = self.syncs, False
        try:
            yield
        finally:
            self.syncs = previous

    def refuse_step(self, optimizer: Optimizer, *_: Any) -> None:
        """Refuse a step inside `no_sync()` of an optimizer of experts while gradients wait in the slots.

        Raises:
            RuntimeError: for such a step.
        """
        if self.syncs or not any(is_sharded(p) for group in optimizer.param_groups for p in group["params"]):
            return
        if any(layer.holds_gradients() for layer in self._waiting):
            raise RuntimeError(
                "optimizer.step() inside no_sync(): the experts' gradients have not been collected from the ranks, so "
                "experts would stay while the rest moves. Run the last backward before a step, and the step, outside "
                "no_sync(). LocalSGD, in which ranks step each for itself, cannot be combined with spread experts. "
                "(FAQ: step-in-no-sync)"
            )

    def on_forward(self) -> None:
        """A forward outside of backward: backwards that are still listed as running have failed."""
        if not in_backward():
            for layers in self._running.values():
                self._waiting |= layers
            self._running.clear()

    def on_backward(self, layer: ShardedLayer) -> None:
        """Backward has reached `layer`, and will add gradients to its slots."""
        layer.gradients.begin_backward()
        backward = torch._C._current_graph_task_id()
        if backward not in self._running:
            self._running[backward] = {}
            # At the end of backward, as in DDP and FSDP2: later hooks, clipping and scalers see collected gradients.
            torch.autograd.Variable._execution_engine.queue_callback(partial(self._end_backward, backward))
        self._running[backward][layer] = None

    def on_gradients(self, layer: ShardedLayer) -> None:
        """Backward has added all gradients that it will to the slots of `layer`."""
        if self.syncs:
            self._start(layer)

    def _end_backward(self, backward: int) -> None:
        self._waiting |= self._running.pop(backward)
        if self.syncs:
            self.collect()

    def collect(self) -> None:
        """The gradients that wait in the slots -> `.grad` of the parameters, averaged over ranks. A collective."""
        waiting, self._waiting = self._waiting, {}
        for layer in sorted(waiting, key=lambda layer: layer.index):
            self._start(layer)
        while self._under_way:
            self._advance()
        collected, self._collected = self._collected, {}
        for layer in collected:
            layer.gradients.add_to_parameters()

    def _start(self, layer: ShardedLayer) -> None:
        # The gradients of the layer before have left: two layers' are held at any time.
        self._advance()
        started = layer.gradients.start_collection()
        if started is not None:
            self._under_way.append((layer, started))

    def _advance(self) -> None:
        """Wait for each exchange under way; with several groups, sums then travel between groups."""
        under_way, self._under_way = self._under_way, []
        for layer, collection in under_way:
            if collection.advance():
                layer.gradients.finish_collection(collection)
                self._collected[layer] = None
            else:
                self._under_way.append((layer, collection))
