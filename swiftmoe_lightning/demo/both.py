"""Static and adaptive replicas, one run after the other: the demo's default."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from swiftmoe_lightning.analysis.report.curves import draw_curves
from swiftmoe_lightning.analysis.time_to_loss import describe
from swiftmoe_lightning.demo.options import DemoOptions
from swiftmoe_lightning.demo.run import Demo, draw_if_possible, print_outcome


class BothDemos:
    """The same model, text and seed trained by both strategies. Wrong options are errors here.

    Args:
        options: of both runs.

    Raises:
        ValueError: as `Demo`.
        OSError: as `Demo`.
    """

    def __init__(self, options: DemoOptions) -> None:
        self._options = options
        self._demos = [
            Demo(replace(options, strategy=strategy, out=options.folder / strategy))
            for strategy in ("static", "swiftmoe")
        ]

    def run(self) -> None:
        """Train both; on rank 0 print their numbers and one sentence, and draw both curves to comparison.png."""
        static, adaptive = [demo.train() for demo in self._demos]
        if static is None or adaptive is None:
            return
        options, num_ranks = self._options, self._demos[0].ranks.total
        title = f"{options.steps} steps of {options.layers} layers x {options.experts} experts on {num_ranks} ranks"
        pictures = draw_if_possible(
            options.folder / "comparison.png", lambda path: draw_curves(static.curve, adaptive.curve, path, title)
        )
        files = [*pictures, "static/", "swiftmoe/"]
        print_outcome(title, {"static": static.rows, "swiftmoe": adaptive.rows}, options.folder, files)
        Console().print(describe(static.curve, adaptive.curve), markup=False)
