"""What is checked against float64, and what is compiled ahead."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from benchmarks.gpu import check, peers
from benchmarks.gpu.candidates import Candidate
from benchmarks.gpu.check import checks
from benchmarks.gpu.shapes import Shape


def test_compiling_ahead_runs_the_named_candidates_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def run(shape: Shape, *inputs: Any) -> Tensor:
        shapes.append(shape)
        return peers.eager_loop(shape, *inputs)

    few = {name: Candidate(run) for name in ("Liger", "ScatterMoE")}
    monkeypatch.setattr("benchmarks.gpu.check.candidates", lambda: (few, {}))
    check.warm_up(Shape("large", 32768, 16, 8, 64, 8), ["Liger", "SonicMoE"], "cpu")
    assert shapes == [Shape("large", 256, 16, 8, 16, 8)]


def test_every_tile_configuration_that_ships_is_checked() -> None:
    from swiftmoe_lightning.ops.triton.fused import tiles

    shipped = {name for name, value in vars(tiles).items() if isinstance(value, tiles.MlpTiles)}
    for tiny in (True, False):
        assert {one.tiles for one in checks(tiny)} == shipped | {""}
