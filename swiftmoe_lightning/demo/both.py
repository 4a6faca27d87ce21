"""Static and adaptive replicas, one run after the other: the demo's default."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from swiftmoe_lightning.analysis.report.curves import draw_curves
from swiftmoe_lightning.analysis.time_to_loss import describe
from swiftmoe_lightning.demo.options import DemoOptions
from swiftmoe_lightning.demo.printing import draw_if_possible, print_next, print_outcome, tell_if_nothing_is_drawn
from swiftmoe_lightning.demo.run import Demo

_PICTURE: Final = "comparison.png"


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
        """Train both; on rank 0 print their numbers and one sentence, and draw both curves to comparison.png.

        Files of an earlier run in the folders are removed first.
        """
        tell_if_nothing_is_drawn()
        self._clear_folders()
        static, adaptive = [demo.train() for demo in self._demos]
        if static is None or adaptive is None:
            return
        options, num_ranks = self._options, self._demos[0].ranks.total
        title = f"{options.steps} steps of {options.layers} layers x {options.experts} experts on {num_ranks} ranks"
        pictures = draw_if_possible(
            options.folder / _PICTURE, lambda path: draw_curves(static.curve, adaptive.curve, path, title)
        )
        files = [*pictures, "static/", "swiftmoe/"]
        print_outcome(title, {"static": static.rows, "swiftmoe": adaptive.rows}, options.folder, files)
        Console().print(describe(static.curve, adaptive.curve), markup=False)
        print_next(options.folder / "swiftmoe")

    @rank_zero_only
    def _clear_folders(self) -> None:
        (self._options.folder / _PICTURE).unlink(missing_ok=True)
        for demo in self._demos:
            demo.clear_folder()
