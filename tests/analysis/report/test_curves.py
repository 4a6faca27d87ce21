"""The picture that two runs end with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from swiftmoe_lightning.analysis.report.curves import draw_curves
from swiftmoe_lightning.analysis.time_to_loss import Curve

STATIC = Curve("static", [0, 10, 20], [0.0, 1.0, 2.0], [5.0, 4.0, 3.0], 0.6)
ADAPTIVE = Curve("swiftmoe", [0, 10, 20], [0.0, 1.5, 3.0], [5.0, 3.0, 2.0], 0.01)


def test_the_picture_also_shows_a_run_that_never_gets_there(tmp_path: Path) -> None:
    for name, adaptive in (("reached", ADAPTIVE), ("never", replace(ADAPTIVE, losses=[5.0, 4.0, 3.5]))):
        draw_curves(STATIC, adaptive, tmp_path / f"{name}.png", name)
        assert (tmp_path / f"{name}.png").stat().st_size > 20_000
