"""Long series made small enough for a page: steps averaged into columns, values as small integers in base64.

U steps, L layers, E experts, W ranks, C columns (neighbouring steps taken together), M lines (one of all layers
together, then one of each).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from swiftmoe_lightning.analysis.report.page_data import PageData, PolicySeries
from swiftmoe_lightning.placement import imbalance

_MOST_COLUMNS: Final = 400
# Base64 makes 4 bytes of 3, and the whole page is to stay below 5 MB.
_MAP_BYTES: Final = 2_600_000
_LINE_BYTES: Final = 900_000
# A model with too many experts for so many columns has some layers left out, rather than columns too wide to read.
_ENOUGH_COLUMNS: Final = 200


@dataclass(frozen=True, eq=False)
class Columns:
    """U steps cut into C columns of neighbouring steps, of equal width up to one step.

    Attributes:
        starts_C: [C] int64, the first row of each column.
        num_steps: U.
    """

    starts_C: np.ndarray
    num_steps: int

    @classmethod
    def of(cls, num_steps: int, most: int) -> Columns:
        """U steps in min(U, `most`) columns.

        Args:
            num_steps: U.
            most: the largest C.
        """
        num_columns = max(min(num_steps, most), 1)
        return cls(np.arange(num_columns) * num_steps // num_columns, num_steps)

    @property
    def widths_C(self) -> np.ndarray:
        """[C] int64: steps of each column."""
        return np.diff(self.starts_C, append=self.num_steps)

    def sum(self, values_Ux: np.ndarray) -> np.ndarray:
        """[U, ...] -> [C, ...]: the sum of each column's steps."""
        return np.add.reduceat(values_Ux, self.starts_C, axis=0)

    def mean(self, values_Ux: np.ndarray) -> np.ndarray:
        """[U, ...] -> [C, ...]: the mean of each column's steps."""
        return self.sum(values_Ux) / self.widths_C.reshape(-1, *[1] * (values_Ux.ndim - 1))

    def least(self, values_Ux: np.ndarray) -> np.ndarray:
        """[U, ...] -> [C, ...]: the smallest of each column's steps."""
        return np.minimum.reduceat(values_Ux, self.starts_C, axis=0)

    def most(self, values_Ux: np.ndarray) -> np.ndarray:
        """[U, ...] -> [C, ...]: the largest of each column's steps."""
        return np.maximum.reduceat(values_Ux, self.starts_C, axis=0)

    def edges(self, step_U: np.ndarray) -> dict[str, Any]:
        """First and last step of each column, and the rows in the widest.

        Args:
            step_U: [U] the optimizer step of each row.

        Returns:
            JSON-able: "first" and "last" C numbers, "widest" one.
        """
        first_C = step_U[self.starts_C]
        last_C = step_U[self.starts_C + self.widths_C - 1]
        return {"first": first_C.tolist(), "last": last_C.tolist(), "widest": int(self.widths_C.max())}


def pack(values: np.ndarray, low: float, high: float, num_bytes: int) -> dict[str, Any]:
    """Values as whole numbers of 1 or 2 bytes (low byte first), in base64; at most half a unit off.

    Args:
        values: in low..high.
        low: what 0 stands for.
        high: what the largest whole number stands for.
        num_bytes: 1 or 2.

    Returns:
        JSON-able: "low", "unit" (the value of 1), "bytes" and "data".
    """
    top = 256**num_bytes - 1
    unit = (high - low) / top or 1.0
    whole = np.clip(np.rint((values - low) / unit), 0, top).astype(f"<u{num_bytes}")
    return {"low": low, "unit": unit, "bytes": num_bytes, "data": base64.b64encode(whole.tobytes()).decode()}


def dropped_share(dropped_x: np.ndarray, total_x: np.ndarray) -> np.ndarray:
    """Dropped assignments over all; 0 where there were none.

    Args:
        dropped_x: [...] dropped assignments.
        total_x: [...] all assignments.
    """
    return dropped_x / np.maximum(total_x, 1)


def lines(data: PageData) -> dict[str, Any]:
    """Survival and imbalance of each policy over the steps: mean and worst, of all layers together and of each."""
    num_steps, num_layers, _ = data.counts_ULE.shape
    bytes_of_column = 8 * (num_layers + 1) * max(len(data.policies), 1)
    columns = Columns.of(num_steps, min(_MOST_COLUMNS, _LINE_BYTES // bytes_of_column))
    total_UL = data.counts_ULE.sum(-1)
    return {
        **columns.edges(data.step_U),
        "survival": [_survival(columns, policy.dropped_UL, total_UL) for policy in data.policies],
        "imbalance": [_imbalance(columns, imbalance(policy.load_ULW)) for policy in data.policies],
    }


def _survival(columns: Columns, dropped_UL: np.ndarray, total_UL: np.ndarray) -> dict[str, Any]:
    dropped_CL, total_CL = columns.sum(dropped_UL), columns.sum(total_UL)
    all_C = dropped_share(dropped_CL.sum(1), total_CL.sum(1))
    worst_CL = columns.most(dropped_share(dropped_UL, total_UL))
    mean_CM = 1 - np.column_stack([all_C, dropped_share(dropped_CL, total_CL)])
    worst_CM = 1 - np.column_stack([worst_CL.max(1), worst_CL])
    return {"mean": pack(mean_CM.T, 0.0, 1.0, 2), "worst": pack(worst_CM.T, 0.0, 1.0, 2)}


def _imbalance(columns: Columns, imbalance_UL: np.ndarray) -> dict[str, Any]:
    mean_CL, worst_CL = columns.mean(imbalance_UL), columns.most(imbalance_UL)
    top = float(imbalance_UL.max())
    mean_CM = np.column_stack([mean_CL.mean(1), mean_CL])
    worst_CM = np.column_stack([worst_CL.max(1), worst_CL])
    return {"mean": pack(mean_CM.T, 1.0, top, 2), "worst": pack(worst_CM.T, 1.0, top, 2)}


def maps(data: PageData) -> dict[str, Any]:
    """Popularity and replicas, [layers shown, E, C]: popularity in mean popularities, so that 1 is balanced."""
    num_steps, num_layers, num_experts = data.counts_ULE.shape
    num_maps = sum(policy.replicas_ULE is not None for policy in data.policies)
    bytes_of_cell = 2 + num_maps
    fitting = _MAP_BYTES // (min(num_steps, _ENOUGH_COLUMNS) * num_experts * bytes_of_cell)
    num_shown = min(max(fitting, 1), num_layers)
    shown = np.linspace(0, num_layers - 1, num_shown).round().astype(int)
    fitting = _MAP_BYTES // (num_shown * num_experts * bytes_of_cell)
    columns = Columns.of(num_steps, min(_MOST_COLUMNS, fitting))

    counts_CLE = columns.sum(data.counts_ULE[:, shown])
    popularity_CLE = counts_CLE / np.maximum(counts_CLE.mean(-1, keepdims=True), 1e-9)
    top = max(float(popularity_CLE.max()), 1.0)
    return {
        **columns.edges(data.step_U),
        "layers": shown.tolist(),
        "popularity": pack(popularity_CLE.transpose(1, 2, 0), 0.0, top, 2),
        # The 99 % quantile, so that a few collapsed steps do not take all the colours.
        "brightest": max(float(np.quantile(popularity_CLE, 0.99)), 1.0),
        "replicas": [_replicas(columns, policy, shown) for policy in data.policies],
    }


def _replicas(columns: Columns, policy: PolicySeries, shown: np.ndarray) -> dict[str, Any] | None:
    if policy.replicas_ULE is None:
        return None
    replicas_CLE = columns.mean(policy.replicas_ULE[:, shown])
    most = max(float(replicas_CLE.max()), 1.0)
    # A replica is a whole number of units, so that whole numbers of replicas are stored without rounding.
    units = max(255 // int(np.ceil(most)), 1)
    packed = pack(replicas_CLE.transpose(1, 2, 0), 0.0, max(255 / units, most), 1)
    return {**packed, "most": most, "slots": int(policy.replicas_ULE[0, 0].sum())}
