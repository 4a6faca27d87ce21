"""Counters of what a layer's experts were given. W ranks, E experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swiftmoe_lightning.placement import ExpertLoad, Placement

NON_FINITE_SCORES = (
    "the router gave non-finite scores in {where}. Training has diverged, or its input holds inf or nan: lower the "
    "learning rate, clip gradients, or add a z-loss (MoE(z_loss_coef=1e-3))."
)


class TrainedLoad:
    """A layer's load since it was built, counted in backward. It only grows: `LoadCursor` takes differences.

    Args:
        placement: where the experts are at the start.
    """

    def __init__(self, placement: Placement) -> None:
        self._total = ExpertLoad.zero(placement)
        # [E + 1] int64: what one device counted, and forwards with non-finite scores, not yet asked for.
        self._on_device: Tensor | None = None

    @property
    def total(self) -> ExpertLoad:
        """The load so far. Waits for the device if it has counted since.

        Raises:
            FloatingPointError: if scores were not finite.
        """
        if self._on_device is not None:
            numbers = self._on_device.cpu().numpy()
            self._on_device = None
            if numbers[-1]:
                raise FloatingPointError(NON_FINITE_SCORES.format(where="an Experts layer"))
            # A single device drops nothing.
            load_W = numbers[:-1].sum(keepdims=True)
            self._total = self._total + ExpertLoad(self._total.placement, numbers[None, :-1], load_W, load_W, 0)
        return self._total

    def add(self, load: ExpertLoad) -> None:
        """Count a load that the host knows.

        Raises:
            FloatingPointError: if scores that the device has looked at before were not finite.
        """
        self._total = self.total + load

    def add_on_device(self, counts_E: Tensor, scores_finite: Tensor) -> None:
        """Count the load of a single device, without waiting for it.

        Args:
            counts_E: [E] int, assignments to each expert.
            scores_finite: [] bool, whether the router's scores were; reading `total` raises if not.
        """
        numbers = torch.cat([counts_E.to(torch.int64), scores_finite.logical_not().view(1).to(torch.int64)])
        self._on_device = numbers if self._on_device is None else self._on_device + numbers


class LoadCursor:
    """How far one reader has read a layer's load; readers do not disturb each other.

    Args:
        trained: gives the layer's load, which may be another object after its ranks have changed.
    """

    def __init__(self, trained: Callable[[], TrainedLoad]) -> None:
        self._trained, self._seen = trained, trained().total

    def read(self) -> ExpertLoad:
        """What was trained since the last read, or since the cursor was made; everything, if the ranks were others."""
        total, seen = self._trained().total, self._seen
        self._seen = total
        return total - seen if total.load_W.shape == seen.load_W.shape else total


def run_once_in_backward(out: Tensor, action: Callable[[], None]) -> Tensor:
    """`out` itself, whose first backward calls `action`.

    Activation checkpointing runs forward twice, and validation never runs backward: so what is counted in here is
    counted once for each trained assignment.

    Args:
        out: what a forward gives; without a gradient it is left alone.
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
