"""What a run saves to a loss that another one reaches: arithmetic on validation losses. V validations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def position_of(loss: float, positions: Sequence[float], losses: Sequence[float]) -> float:
    """Where a run first reaches a loss, between two validations on the straight line through them.

    Losses rise and fall by chance, so what counts is the least one so far.

    Args:
        loss: nats.
        positions: [V] where the validations were, ascending: steps or seconds.
        losses: [V] what they gave.

    Returns:
        As the positions are; infinite if the run never gets there.
    """
    least = np.minimum.accumulate(np.asarray(losses, dtype=float))
    reached = np.flatnonzero(least <= loss)
    if not len(reached):
        return math.inf
    after = reached[0]
    if after == 0:
        return float(positions[0])
    share = (least[after - 1] - loss) / (least[after - 1] - least[after])
    return float(positions[after - 1] + share * (positions[after] - positions[after - 1]))


def target_loss(share: float, positions: Sequence[float], losses: Sequence[float]) -> float:
    """The least loss that a run has seen after a share of its steps.

    Args:
        share: 0..1.
        positions: [V] as in `position_of`.
        losses: [V] as in `position_of`.
    """
    until = np.asarray(positions) <= share * positions[-1] + 1e-9
    return float(np.min(np.asarray(losses, dtype=float)[until]))


def saved(position: float, baseline: float) -> float:
    """1 - position / baseline, the share that is saved: below 0 it takes longer, minus infinity never arrives."""
    return 1 - position / baseline


@dataclass(frozen=True, eq=False)
class Curve:
    """What a run reached, and when.

    Attributes:
        label: the strategy.
        steps: [V] optimizer steps done before each validation.
        seconds: [V] spent in them, without validations.
        losses: [V] nats a byte.
        dropped: share of all assignments that were over capacity.
    """

    label: str
    steps: list[int]
    seconds: list[float]
    losses: list[float]
    dropped: float


def describe(static: Curve, adaptive: Curve) -> str:
    """One sentence: steps and time to static's best loss, and what was dropped.

    Args:
        static: the run whose replicas stay.
        adaptive: the run whose replicas follow popularity.
    """
    loss = target_loss(1.0, static.steps, static.losses)
    drops = f"dropped {adaptive.dropped:.1%} of the tokens' expert assignments instead of {static.dropped:.1%}"
    steps = position_of(loss, adaptive.steps, adaptive.losses)
    if not math.isfinite(steps):
        return f"{adaptive.label} {drops}, and did not reach {static.label}'s best loss, {loss:.3f}."
    steps_saved = saved(steps, position_of(loss, static.steps, static.losses))
    seconds = position_of(loss, adaptive.seconds, adaptive.losses)
    time_saved = saved(seconds, position_of(loss, static.seconds, static.losses))
    return (
        f"{adaptive.label} reached {static.label}'s best loss, {loss:.3f}, in "
        f"{_less(steps_saved, 'fewer')} steps and {_less(time_saved, 'less')} time: it {drops}."
    )


def _less(share: float, less: str) -> str:
    return f"{share:.0%} {less}" if share >= 0 else f"{-share:.0%} more"
