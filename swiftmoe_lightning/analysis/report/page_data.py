"""The data of a report page: popularity, and each placement policy's results.

U steps, L layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class PolicySeries:
    """One policy replayed on the trace, or the recorded run itself.

    Bytes are means of a step over all layers and ranks; None when not counted.

    Attributes:
        name: "balanced", "symi", "static", "recorded", ...
        label: its kind, for tables: "pooled rank budget", "slot budget", "re-implementation", ...
        replicas_ULE: [U, L, E] slots of each expert, or None when they are not known.
        dropped_UL: [U, L] assignments over capacity; all 0 when dropless.
        load_ULW: [U, L, W] assignments that each rank computed.
        moved_UL: [U, L] (rank, expert) pairs that were not there a step before.
        bytes_gradients: what the gradients' phase sends.
        bytes_weights: what the weights' phase sends.
        bytes_paper: gradients and weights together, if they were sent the paper's way.
        bytes_state_moved: optimizer state that is sent because replicas moved.
        losses: what was lost to "split", "placement", "prediction", "floor" and "rounding". They add up to the dropped
            share of assignments, or, when dropless, to mean imbalance - 1. May be empty.
    """

    name: str
    label: str
    replicas_ULE: np.ndarray | None
    dropped_UL: np.ndarray
    load_ULW: np.ndarray
    moved_UL: np.ndarray
    bytes_gradients: float | None
    bytes_weights: float | None
    bytes_paper: float | None
    bytes_state_moved: float | None
    losses: Mapping[str, float]

    @property
    def sent(self) -> tuple[float | None, ...]:
        """Bytes of gradients, of weights, of both the paper's way, and of moved state."""
        return self.bytes_gradients, self.bytes_weights, self.bytes_paper, self.bytes_state_moved


@dataclass(frozen=True, eq=False)
class PageData:
    """A run or a trace, and the policies to compare on it.

    Attributes:
        title: the page's.
        subtitle: the line below it.
        counts_ULE: [U, L, E] int64 popularity.
        step_U: [U] the optimizer step of each row, ascending.
        layers: L names.
        policies: in the order to show them.
        capacity_factor: None when nothing is dropped.

    Raises:
        ValueError: for arrays whose shapes do not fit each other, or that are empty.
    """

    title: str
    subtitle: str
    counts_ULE: np.ndarray
    step_U: np.ndarray
    layers: tuple[str, ...]
    policies: tuple[PolicySeries, ...]
    capacity_factor: float | None

    def __post_init__(self) -> None:
        if self.counts_ULE.ndim != 3 or 0 in self.counts_ULE.shape:
            raise ValueError(
                f"counts_ULE must be [steps, layers, experts] with at least one of each, got {self.counts_ULE.shape}. "
                "Record at least one step."
            )
        num_steps, num_layers, num_experts = self.counts_ULE.shape
        self._check("step_U", np.shape(self.step_U), (num_steps,))
        self._check("layers", (len(self.layers),), (num_layers,))
        for policy in self.policies:
            steps_and_layers = (num_steps, num_layers)
            self._check(f"dropped_UL of {policy.name}", policy.dropped_UL.shape, steps_and_layers)
            self._check(f"moved_UL of {policy.name}", policy.moved_UL.shape, steps_and_layers)
            self._check(f"load_ULW of {policy.name}", policy.load_ULW.shape[:2], steps_and_layers)
            if policy.replicas_ULE is not None:
                self._check(f"replicas_ULE of {policy.name}", policy.replicas_ULE.shape, self.counts_ULE.shape)

    def _check(self, name: str, shape: tuple[int, ...], needed: tuple[int, ...]) -> None:
        if tuple(shape) != needed:
            raise ValueError(
                f"{name} has shape {tuple(shape)}, but counts_ULE is {self.counts_ULE.shape}, so it must be {needed}. "
                "Give all series the same steps and layers."
            )
