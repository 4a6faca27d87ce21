from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning.analysis.report.picture import draw_picture
from swiftmoe_lightning.placement import imbalance


def recording(steps: int, ranks: int, layers: int, experts: int, most_replicas: int = 4) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "counts": random.integers(0, 50, (steps, ranks, layers, experts)),
        "replicas": random.integers(1, most_replicas + 1, (steps, layers, experts)),
        "loads": random.integers(0, 99, (steps, layers, ranks)),
        "dropped": random.integers(0, 9, (steps, layers)),
        "moved": random.integers(0, 9, (steps, layers)),
        "step": np.arange(1, steps + 1),
        "metadata": np.array(json.dumps({"layers": [f"blocks.{i}.experts" for i in range(layers)]})),
    }


@pytest.mark.parametrize("sizes", [(40, 4, 3, 16), (1, 1, 1, 1), (30, 2, 20, 8), (5, 64, 1, 8, 40)])
def test_runs_of_all_sizes_are_drawn(sizes: tuple[int, ...], tmp_path: Path) -> None:
    draw_picture(recording(*sizes), tmp_path / "picture.png", "a run")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_steps_without_tokens_are_drawn(tmp_path: Path) -> None:
    empty = {k: v if k == "metadata" else np.zeros_like(v) for k, v in recording(3, 2, 2, 4).items()}
    draw_picture({**empty, "step": np.arange(3)}, tmp_path / "picture.png", "nothing")
    assert (tmp_path / "picture.png").exists()


def test_imbalance_is_the_busiest_rank_over_the_mean() -> None:
    assert imbalance(np.array([[[3, 1], [2, 2], [0, 0]]])).tolist() == [[1.5, 1.0, 1.0]]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'needs matplotlib.*pip install "swiftmoe-lightning\[report\]"'):
        draw_picture(recording(2, 2, 2, 4), tmp_path / "picture.png", "a run")
