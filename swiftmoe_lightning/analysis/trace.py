"""Token counts of a run, step by step: the input of every replay.

U steps, W source ranks, L layers, E experts. An assignment is one token's choice of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

import numpy as np

# Arrays that a recording may have besides the counts, and their axes.
RECORDED_AXES: Final[Mapping[str, str]] = MappingProxyType(
    {"replicas": "ULE", "loads": "ULW", "dropped": "UL", "moved": "UL"}
)
_AXES: Final = {"U": "steps", "W": "ranks", "L": "layers", "E": "experts"}
# Below it, budgets and shares of counts fit int64, and counts are whole numbers of float64.
_MOST_ASSIGNMENTS: Final = 2**50
# More than any trace needs. A file that claims more is refused before memory is allocated.
_MOST_BYTES: Final = 2**32


@dataclass(frozen=True, eq=False)
class Trace:
    """Assignments that each source rank routed to each expert, in every step and layer.

    Attributes:
        counts_UWLE: [U, W, L, E] whole numbers of 0 or more, kept as int64. W is 1 where ranks were not told apart.
        layers: L names; left out, "0", "1", ...
        step_U: [U] rising whole numbers, the training step of each row; left out, 0, 1, ...
        metadata: whatever else the file says about the run.
        recorded: what the run itself did, if it is known: any of `replicas` [U, L, E], `loads` [U, L, ranks],
            `dropped` [U, L], `moved` [U, L], as `PlacementRecorder` describes them.

    Raises:
        ValueError: for counts of another shape or type, negative, fractional or not finite ones, no step, layer or
            expert, not a single assignment, other arrays that do not fit the counts, or more dropped than was there.
    """

    counts_UWLE: np.ndarray
    layers: Sequence[str] = ()
    step_U: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    metadata: Mapping[str, Any] = field(default_factory=dict)
    recorded: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts_UWLE = np.asarray(self.counts_UWLE)
        if counts_UWLE.ndim != 4:
            raise ValueError(
                f"counts must have 4 axes, [steps, source ranks, layers, experts], got shape {counts_UWLE.shape}. "
                "Without ranks, give them an axis of 1."
            )
        if not counts_UWLE.size:
            raise ValueError(
                f"counts must hold at least one step, rank, layer and expert, got shape {counts_UWLE.shape}. "
                "Record at least one step."
            )
        counts_UWLE = _whole_numbers("counts", counts_UWLE)
        if not counts_UWLE.any():
            raise ValueError(
                f"counts of shape {counts_UWLE.shape} are all 0, and a plan needs at least one assignment. Record "
                "steps that route tokens."
            )
        object.__setattr__(self, "counts_UWLE", counts_UWLE)
        self._check_layers()
        self._check_steps()
        object.__setattr__(self, "recorded", {name: self._checked(name, a) for name, a in self.recorded.items()})
        self._check_totals()

    @property
    def num_steps(self) -> int:
        """How many steps, U."""
        return self.counts_UWLE.shape[0]

    @property
    def num_sources(self) -> int:
        """How many source ranks, W; 1 where ranks were not told apart."""
        return self.counts_UWLE.shape[1]

    @property
    def num_layers(self) -> int:
        """How many layers, L."""
        return self.counts_UWLE.shape[2]

    @property
    def num_experts(self) -> int:
        """How many experts, E."""
        return self.counts_UWLE.shape[3]

    @cached_property
    def popularity_ULE(self) -> np.ndarray:
        """[U, L, E] int64: assignments of all ranks."""
        return self.counts_UWLE.sum(1)

    def _check_layers(self) -> None:
        names = tuple(self.layers) or tuple(str(layer) for layer in range(self.num_layers))
        if len(names) != self.num_layers:
            raise ValueError(
                f"layers must name the {self.num_layers} layers of counts, got {len(names)} names. Leave them out for "
                '"0", "1", ...'
            )
        object.__setattr__(self, "layers", names)

    def _check_steps(self) -> None:
        step_U = np.asarray(self.step_U)
        if not step_U.size:
            step_U = np.arange(self.num_steps)
        if step_U.shape != (self.num_steps,):
            raise ValueError(
                f"step must hold one number for each of the {self.num_steps} steps of counts, got shape "
                f"{step_U.shape}. Leave it out for 0, 1, ..."
            )
        step_U = _whole_numbers("step", step_U)
        falls_U = np.diff(step_U) <= 0
        if falls_U.any():
            row = int(falls_U.argmax())
            raise ValueError(
                f"step must rise from row to row, got {step_U[row + 1]} after {step_U[row]}. Leave it out for 0, 1, ..."
            )
        object.__setattr__(self, "step_U", step_U)

    def _check_totals(self) -> None:
        """No step dropped, or computed, more assignments than it had."""
        total_UL = self.counts_UWLE.sum((1, 3))
        for name in ("dropped", "loads"):
            if name not in self.recorded:
                continue
            recorded_UL = self.recorded[name].reshape(*total_UL.shape, -1).sum(2)
            if (is_more_UL := recorded_UL > total_UL).any():
                first = np.unravel_index(int(is_more_UL.argmax()), is_more_UL.shape)
                raise ValueError(
                    f"{name} must be at most the assignments of its step, got {recorded_UL[first]} of "
                    f"{total_UL[first]} in row {int(first[0])}, layer {int(first[1])}: the trace is damaged. Copy or "
                    "record it again."
                )

    def _checked(self, name: str, values: np.ndarray) -> np.ndarray:
        """One array of `recorded`, if its name is known and its shape fits the counts."""
        if name not in RECORDED_AXES:
            raise ValueError(f"recorded may hold {', '.join(RECORDED_AXES)}, got {name!r}. Keep it in metadata.")
        axes, values = RECORDED_AXES[name], np.asarray(values)
        sizes: dict[str, int | None] = dict(zip("UWLE", self.counts_UWLE.shape, strict=True))
        if self.num_sources == 1:
            # The counts do not tell the number of the run's ranks.
            sizes["W"] = None
        needed_shape = [sizes[axis] for axis in axes]
        fits = values.ndim == len(needed_shape) and all(
            needed in (None, size) for needed, size in zip(needed_shape, values.shape, strict=True)
        )
        if not fits:
            needed_axes = ", ".join(
                f"{_AXES[axis]}{'' if sizes[axis] is None else f' = {sizes[axis]}'}" for axis in axes
            )
            raise ValueError(
                f"{name} must have the axes [{needed_axes}] to fit counts, got shape {values.shape}. Drop it."
            )
        return _whole_numbers(name, values)


def check_bytes(what: str, num_bytes: int) -> None:
    """Make sure that something needs no more memory than any trace does.

    Args:
        what: its name, for the message.
        num_bytes: what it needs.

    Raises:
        ValueError: if it needs more.
    """
    if num_bytes > _MOST_BYTES:
        raise ValueError(
            f"{what} would take {num_bytes} bytes, more than {_MOST_BYTES}. Take fewer steps or ranks, or copy the "
            "file again if it is damaged."
        )


def _whole_numbers(name: str, values: np.ndarray) -> np.ndarray:
    """The same as int64. Raises ValueError, with the first wrong entry, unless all are whole numbers of 0 or more."""
    if values.dtype.kind not in "iuf":
        raise ValueError(f"{name} must be whole numbers, got dtype {values.dtype}. Save them as int64.")
    if values.dtype.kind == "f":
        _refuse(name, values, ~np.isfinite(values), "Leave out the steps that broke.")
        _refuse(name, values, values != np.floor(values), "Give numbers of assignments, not shares.")
    _refuse(name, values, values < 0, "Give numbers of assignments.")
    if values.sum(dtype=np.float64) > _MOST_ASSIGNMENTS:
        raise ValueError(f"{name} must add up to no more than 2**50, got {values.max()} at the most. Are they counts?")
    return values.astype(np.int64, copy=False)


def _refuse(name: str, values: np.ndarray, is_wrong: np.ndarray, fix: str) -> None:
    if is_wrong.any():
        first = np.unravel_index(int(is_wrong.argmax()), is_wrong.shape)
        index = ", ".join(str(int(i)) for i in first)
        raise ValueError(f"{name} must be whole numbers of 0 or more, got {values[first]} at [{index}]. {fix}")
