"""Popularity and replicas of a run so far, as images of bounded size and number. E experts of a layer, C columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from swiftmoe_lightning.analysis.report.picture import heat_map_image, spread_out
from swiftmoe_lightning.modules import LayerLoad

_MOST_COLUMNS: Final = 400
_MOST_IMAGES: Final = 100


@dataclass(frozen=True, eq=False)
class _Column:
    """Neighbouring steps, added up.

    Attributes:
        first_step: of them.
        num_steps: how many.
        sums: layer -> [2, E] int64, popularity and replicas.
    """

    first_step: int
    num_steps: int
    sums: Mapping[str, np.ndarray]

    def __add__(self, other: _Column) -> _Column:
        sums = {name: values + other.sums[name] for name, values in self.sums.items()}
        return _Column(self.first_step, self.num_steps + other.num_steps, sums)


class HeatMaps:
    """Keeps the popularity and replicas of a run, and says when to draw them.

    A column is one step until there are 400 of them; then it is two steps, and so on. After 100 drawings they are half
    as frequent, and so on. So a run may be as long as it likes.

    Args:
        every_n_steps: between two drawings.
        num_experts: layer -> E. Of more than 6 layers 6 are kept, first to last.
    """

    def __init__(self, every_n_steps: int, num_experts: Mapping[str, int]) -> None:
        self._every_n_steps, self._num_drawn = every_n_steps, 0
        self._num_experts = {name: num_experts[name] for name in spread_out(list(num_experts))}
        self._columns: list[_Column] = []
        self._width, self._since_drawn = 1, 0

    @property
    def is_due(self) -> bool:
        """Whether it is time to draw."""
        return self._since_drawn >= self._every_n_steps

    @property
    def is_behind(self) -> bool:
        """Whether there were steps since the last drawing."""
        return self._since_drawn > 0

    def add(self, step: int, loads: Mapping[str, LayerLoad]) -> None:
        """Add a step.

        Args:
            step: its number.
            loads: of the layers that it used. The others get zeros.
        """
        sums = {name: np.zeros((2, num), dtype=np.int64) for name, num in self._num_experts.items()}
        for name in sums.keys() & loads.keys():
            sums[name][:] = loads[name].popularity_E, loads[name].replica_counts_E
        column = _Column(step, 1, sums)
        if self._columns and self._columns[-1].num_steps < self._width:
            self._columns[-1] += column
        else:
            self._columns.append(column)
        if len(self._columns) > _MOST_COLUMNS:
            self._width *= 2
            pairs = [self._columns[i : i + 2] for i in range(0, len(self._columns), 2)]
            self._columns = [sum(rest, start=first) for first, *rest in pairs]
        self._since_drawn += 1

    def draw(self) -> dict[str, np.ndarray]:
        """What -> [height, width, 3] uint8: "popularity", 1 where it is balanced, and "replicas"."""
        self._since_drawn, self._num_drawn = 0, self._num_drawn + 1
        if self._num_drawn == _MOST_IMAGES:
            self._every_n_steps, self._num_drawn = 2 * self._every_n_steps, _MOST_IMAGES // 2
        step_C = np.array([column.first_step for column in self._columns])
        num_steps_C1 = np.array([[column.num_steps] for column in self._columns])
        popularity, replicas = {}, {}
        for name in self._num_experts:
            popularity_CE, replicas_CE = np.stack([column.sums[name] for column in self._columns], axis=1)
            popularity[name] = popularity_CE / np.maximum(popularity_CE.mean(1, keepdims=True), 1e-9)
            replicas[name] = replicas_CE / num_steps_C1
        return {
            "popularity": heat_map_image("popularity", popularity, step_C),
            "replicas": heat_map_image("replicas", replicas, step_C),
        }
