from __future__ import annotations

from pathlib import Path

from swiftmoe_lightning.analysis import recommend
from swiftmoe_lightning.analysis.report.sweep_picture import draw_sweep
from tests.analysis.test_recommend import point


def test_a_sweep_of_several_groups_and_one_of_a_single_point_are_drawn(tmp_path: Path) -> None:
    points = [point(4, 1.3, 2, seconds=0.004), point(5, 1.1, 2), point(2, 1.2), point(3, 1.05), point(4, 1.049)]
    for number, shown in enumerate((points, points[:1])):
        path = tmp_path / f"{number}.png"
        draw_sweep(shown, recommend(shown, 0.01, 1e12), path, "a trace")
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000
