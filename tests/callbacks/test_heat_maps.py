from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import swiftmoe_lightning as sml
from swiftmoe_lightning.callbacks import heat_maps
from swiftmoe_lightning.callbacks.heat_maps import HeatMaps


def load(popularity_E: Any, replicas_E: Any) -> Any:
    return SimpleNamespace(popularity_E=np.array(popularity_E), replica_counts_E=np.array(replicas_E))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are the numbers that they would be drawn of."""
    monkeypatch.setattr(heat_maps, "heat_map_image", lambda _, maps, steps: (maps, steps.tolist()))


@pytest.mark.usefixtures("drawn")
def test_steps_are_added_up_two_by_two_when_there_are_too_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat_maps, "_MOST_COLUMNS", 4)
    maps = HeatMaps(1, {"a": 2, "unused": 3})
    for step in range(1, 10):
        maps.add(step, {"a": load([step, 1], [2, 1 + step % 2])})
    # Nine steps: when the fifth came, columns were of two steps, and of four when the ninth did.
    (popularity, steps), (replicas, _) = maps.draw().values()
    assert steps == [1, 5, 9]
    sums = np.array([[1 + 2 + 3 + 4, 4], [5 + 6 + 7 + 8, 4], [9, 1]])
    np.testing.assert_allclose(popularity["a"], sums / sums.mean(1, keepdims=True))
    np.testing.assert_allclose(replicas["a"], [[2, 1.5], [2, 1.5], [2, 2]])
    assert popularity["unused"].tolist() == replicas["unused"].tolist() == [[0, 0, 0]] * 3


@pytest.mark.usefixtures("drawn")
def test_images_become_rarer_and_of_many_layers_a_few_are_kept() -> None:
    maps = HeatMaps(10, {f"layer {i}": 2 for i in range(50)})
    drawn_at = []
    for step in range(1, 10_001):
        maps.add(step, {"layer 0": load([1, 1], [1, 1])})
        if maps.is_due:
            (popularity, steps), _ = maps.draw().values()
            drawn_at.append(step)
    assert drawn_at[:2] == [10, 20]
    assert drawn_at[98:102] == [990, 1000, 1020, 1040]
    assert len(drawn_at) < 300
    assert len(steps) <= 400
    assert [*popularity] == [f"layer {i}" for i in (0, 10, 20, 29, 39, 49)]


def test_an_image_has_a_size_of_its_own_whatever_the_run_and_the_options_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    maps = HeatMaps(1, {"small": 2, "large": 512})
    for step in range(450):
        maps.add(step, {"small": load([step, 1], [1, 3]), "large": load(np.arange(512), np.ones(512, dtype=int))})
    popularity, replicas = maps.draw().values()
    assert popularity.shape == replicas.shape == (290, 800, 3)
    assert popularity.dtype == np.uint8
    assert len(np.unique(popularity.reshape(-1, 3), axis=0)) > 50

    for steps in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"heatmap_every_n_steps must be a whole number of 1 or more, got {steps}"):
            sml.ExpertPopularityMonitor(heatmap_every_n_steps=steps)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "swiftmoe-lightning\[report\]"'):
        sml.ExpertPopularityMonitor(heatmap_every_n_steps=1)
    sml.ExpertPopularityMonitor()
