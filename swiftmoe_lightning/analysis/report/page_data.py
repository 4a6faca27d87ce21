"""What a report page is made from: popularity, and what each placement policy made of it.

S steps, L layers, E experts, W ranks.
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
        label: how it is judged: "pooled rank budget", "slot budget", "re-implementation", ...
        replicas_SLE: [S, L, E] slots of each expert, or None when they are not known.
        dropped_SL: [S, L] assignments over capacity; all 0 when dropless.
        load_SLW: [S, L, W] assignments that each rank computed.
        moved_SL: [S, L] (rank, expert) pairs that became hosts.
        bytes_gradients: what the gradients' phase sends.
        bytes_weights: what the weights' phase sends.
        bytes_paper: gradients and weights together, if they were sent the paper's way.
        bytes_state_moved: optimizer state that is sent because replicas moved.
        losses: what was lost to "split", "placement", "prediction", "floor" and "rounding". They add up to the dropped
            share of assignments, or, when dropless, to mean imbalance - 1. May be empty.
    """

    name: str
    label: str
    replicas_SLE: np.ndarray | None
    dropped_SL: np.ndarray
    load_SLW: np.ndarray
    moved_SL: np.ndarray
    bytes_gradients: float | None
    bytes_weights: float | None
    bytes_paper: float | None
    bytes_state_moved: float | None
    losses: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class PageData:
    """A run or a trace, and the policies to compare on it.

    Attributes:
        title: the page's.
        subtitle: the line below it.
        counts_SLE: [S, L, E] int64 popularity.
        step_S: [S] the optimizer step of each row, ascending.
        layers: L names.
        policies: in the order to show them.
        capacity_factor: None when nothing is dropped.

    Raises:
        ValueError: for arrays whose shapes do not fit each other, or that are empty.
    """

    title: str
    subtitle: str
    counts_SLE: np.ndarray
    step_S: np.ndarray
    layers: tuple[str, ...]
    policies: tuple[PolicySeries, ...]
    capacity_factor: float | None

    def __post_init__(self) -> None:
        if self.counts_SLE.ndim != 3 or 0 in self.counts_SLE.shape:
            raise ValueError(
                f"counts_SLE must be [steps, layers, experts] with at least one of each, got {self.counts_SLE.shape}. "
                "Record at least one step."
            )
        num_steps, num_layers, num_experts = self.counts_SLE.shape
        self._check("step_S", np.shape(self.step_S), (num_steps,))
        self._check("layers", (len(self.layers),), (num_layers,))
        for policy in self.policies:
            steps_and_layers = (num_steps, num_layers)
            self._check(f"dropped_SL of {policy.name}", policy.dropped_SL.shape, steps_and_layers)
            self._check(f"moved_SL of {policy.name}", policy.moved_SL.shape, steps_and_layers)
            self._check(f"load_SLW of {policy.name}", policy.load_SLW.shape[:2], steps_and_layers)
            if policy.replicas_SLE is not None:
                self._check(f"replicas_SLE of {policy.name}", policy.replicas_SLE.shape, self.counts_SLE.shape)

    def _check(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if tuple(found) != wanted:
            raise ValueError(
                f"{name} has shape {tuple(found)}, but counts_SLE is {self.counts_SLE.shape}, so it must be {wanted}. "
                "Give all series the same steps and layers."
            )
