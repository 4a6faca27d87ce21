"""The phases of a step are named ranges of torch's profiler, and so of Lightning's."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from lightning.pytorch.profilers import PyTorchProfiler

from tests.helpers import run_ranks
from tests.strategies.cases import GLOBAL_BATCH, Model, loader, trainer


def fit(folder: Path) -> None:
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=3)
    profiler = PyTorchProfiler(folder, "profile", export_to_chrome=False, row_limit=-1, schedule=schedule)
    trainer(2, profiler=profiler, limit_val_batches=0).fit(Model(), loader(2), loader(2, GLOBAL_BATCH))


def test_phases_are_rows_of_lightnings_profiler(tmp_path: Path) -> None:
    run_ranks(fit, 2, tmp_path, init=False)
    for rank in (0, 1):
        rows = (tmp_path / f"fit-profile-{rank}.txt").read_text().splitlines()
        ranges = {found[1]: row for row in rows if (found := re.match(r"\s*swiftmoe::(\w+) ", row))}
        names = {"route", "count", "plan", "dispatch", "experts", "combine", "collect", "place", "distribute"}
        assert names <= ranges.keys()
