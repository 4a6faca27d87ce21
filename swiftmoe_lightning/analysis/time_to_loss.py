"""What a run saves to a loss that another one reaches: arithmetic on validation losses. V validations."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
