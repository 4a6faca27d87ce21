"""Counts the load that a layer trains on, and reads it. W ranks, E experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swiftmoe_lightning.distributed import to_host
from swiftmoe_lightning.placement import ExpertLoad, Placement

NON_FINITE_SCORES = (
    "the router gave non-finite scores in {where}. Training has diverged, or its input holds inf or nan: lower the "
    "learning rate, clip gradients, or add a z-loss (MoE(z_loss_coef=1e-3)). (FAQ: non-finite-scores)"
)


class TrainedLoad:
    """A layer's load since it was built, counted in backward. It only grows; `LoadCursor` reads differences.

    Args:
        placement: where the experts are at the start.
    """

    def __init__(self, placement: Placement) -> None:
        self._total = ExpertLoad.zero(placement)
        # [E + 1] int64, counted on the device and not yet added to `_total`: assignments of each expert, then how many
        # forwards had non-finite scores.
        self._on_device: Tensor | None = None

    @property
    def total(self) -> ExpertLoad:
        """The load so far. Waits for the device if it has counted since.

        Raises:
            FloatingPointError: if scores were not finite.
        """
        if self._on_device is not None:
            numbers = to_host(self._on_device)
            self._on_device = None
            if numbers[-1]:
                raise FloatingPointError(NON_FINITE_SCORES.format(where="an Experts layer"))
            # A single device drops nothing.
            load_W = numbers[:-1].sum(keepdims=True)
            self._total = self._total + ExpertLoad(self._total.placement, numbers[None, :-1], load_W, load_W, 0)
        return self._total

    def add(self, load: ExpertLoad) -> None:
        """Add a load that is known on the CPU.

        Raises:
            FloatingPointError: if scores that were counted on the device before were not finite.
        """
        self._total = self.total + load

    def add_on_device(self, counts_E: Tensor, scores_finite: Tensor) -> None:
        """Add the load of a single device, without waiting for it.

        Args:
            counts_E: [E] int, assignments to each expert.
            scores_finite: [] bool, whether the router's scores were; reading `total` raises if not.
        """
        numbers = torch.cat([counts_E.to(torch.int64), scores_finite.logical_not().view(1).to(torch.int64)])
        self._on_device = numbers if self._on_device is None else self._on_device + numbers


class LoadCursor:
    """How far one reader has read a layer's load; readers do not disturb each other.

    Args:
        trained: returns the layer's load; an engine replaces that object when it spreads the layer.
    """

    def __init__(self, trained: Callable[[], TrainedLoad]) -> None:
        self._trained, self._last_total = trained, trained().total

    def read(self) -> ExpertLoad:
        """The load since the last read, or since the cursor was made; the total, if the number of ranks has changed."""
        total, last_total = self._trained().total, self._last_total
        self._last_total = total
        return total - last_total if total.load_W.shape == last_total.load_W.shape else total


def in_backward() -> bool:
    """Whether autograd runs a backward on this thread: then a forward is the repetition of a checkpointed one."""
    return torch._C._current_graph_task_id() != -1


def run_once_in_backward(out: Tensor, action: Callable[[], None]) -> Tensor:
    """Let the first backward through `out` call `action`. Returns `out`.

    Activation checkpointing runs forward twice, and validation runs no backward: counting in backward counts each
    trained assignment once.

    Args:
        out: the result of a forward. If it needs no gradient, nothing is done.
        action: called once, whatever the number of backwards.
    """
    has_run = False

    def run(_: Any) -> None:
        nonlocal has_run
        if not has_run:
            has_run = True
            action()

    if out.requires_grad:
        out.register_hook(run)
    return out
