"""Which runs a preset is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from benchmarks.convergence.runner import Task, run_all
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.training import Run

FLEXMOE: Final = ("flexmoe-100", "flexmoe-50", "flexmoe-10")
_MAIN_SYSTEMS: Final = ("static", *FLEXMOE, "symi", "balanced")
_ALL_SYSTEMS: Final = ("deepspeed", *_MAIN_SYSTEMS, "packed", "dropless")
_TWO_SYSTEMS: Final = ("static", "balanced")
_FEW_SYSTEMS: Final = ("static", "flexmoe-10", "symi", "balanced", "dropless")


@dataclass(frozen=True)
class Experiment:
    """One setting, trained by some systems.

    Attributes:
        title: what is special about it.
        setting: what is trained.
        systems: of `SYSTEMS`.
        seeds: of each.
    """

    title: str
    setting: Setting
    systems: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def tasks(self) -> list[Task]:
        """Its runs, all systems of one seed before the next seed."""
        return [Task(self.setting, system, seed) for seed in self.seeds for system in self.systems]

    def gather(self, folder: Path, on_run: Callable[[], object] = lambda: None) -> dict[int, dict[str, Run]]:
        """Seed -> system -> its run, from disk, or trained now.

        Args:
            folder: for runs and corpus.
            on_run: called after each run.
        """
        runs = {}
        for task, run in run_all(self.tasks, folder):
            runs[task] = run
            on_run()
        return {seed: {task.system: runs[task] for task in self.tasks if task.seed == seed} for seed in self.seeds}


_BASE: Final = Setting()
_QUICK: Final = replace(_BASE, num_layers=2, num_steps=500)
PRESETS: Final = {
    "smoke": (
        Experiment(
            "a few steps of a tiny model",
            Setting(
                corpus="shakespeare", num_layers=1, dim=32, hidden_dim=32, num_steps=20, warm_up=2, validate_every=5
            ),
            _MAIN_SYSTEMS,
            seeds=(0,),
        ),
    ),
    "quick": (Experiment("two layers", _QUICK, _MAIN_SYSTEMS),),
    # What the saving depends on: one thing changed at a time, from "quick"; about an hour.
    "limits": (
        Experiment("dropless", _QUICK, ("static", "balanced", "dropless")),
        Experiment("aux loss 1e-2", replace(_QUICK, aux_loss_coef=1e-2), _TWO_SYSTEMS),
        Experiment("router bias 1e-3", replace(_QUICK, aux_loss_coef=0.0, bias_update_rate=1e-3), _TWO_SYSTEMS),
        Experiment("top-2", replace(_QUICK, top_k=2), _TWO_SYSTEMS),
        Experiment("capacity factor 2", replace(_QUICK, capacity_factor=2.0), _TWO_SYSTEMS),
        Experiment("experts a quarter as wide", replace(_QUICK, hidden_dim=128), _TWO_SYSTEMS),
        Experiment("one kind of text", replace(_QUICK, corpus="shakespeare"), _TWO_SYSTEMS),
        Experiment("32 experts", replace(_QUICK, num_experts=32), _TWO_SYSTEMS),
        Experiment("four layers", replace(_QUICK, num_layers=4), _TWO_SYSTEMS),
        Experiment("a model twice as wide", replace(_QUICK, dim=128, hidden_dim=1024), _TWO_SYSTEMS),
        Experiment("2000 steps", replace(_QUICK, num_steps=2000), _TWO_SYSTEMS),
    ),
    "full": (
        Experiment("the mix, four layers", _BASE, _ALL_SYSTEMS),
        Experiment("aux loss 1e-2", replace(_BASE, aux_loss_coef=1e-2), _FEW_SYSTEMS),
        Experiment("no aux loss", replace(_BASE, aux_loss_coef=0.0), _FEW_SYSTEMS),
        Experiment("router bias 1e-3", replace(_BASE, aux_loss_coef=0.0, bias_update_rate=1e-3), _FEW_SYSTEMS),
        Experiment("top-2", replace(_BASE, top_k=2), _FEW_SYSTEMS),
        Experiment("capacity factor 1.25", replace(_BASE, capacity_factor=1.25), _FEW_SYSTEMS),
        Experiment("capacity factor 2", replace(_BASE, capacity_factor=2.0), _FEW_SYSTEMS),
        Experiment("two layers", replace(_BASE, num_layers=2), _FEW_SYSTEMS),
        Experiment("2000 steps", replace(_BASE, num_steps=2000), ("static", "flexmoe-10", "symi", "balanced")),
        Experiment("one kind of text", replace(_BASE, corpus="shakespeare"), _FEW_SYSTEMS),
        Experiment("32 experts", replace(_BASE, num_experts=32), _FEW_SYSTEMS),
        Experiment("experts half as wide", replace(_BASE, hidden_dim=256), _FEW_SYSTEMS),
        Experiment("a model twice as wide", replace(_BASE, dim=128), _FEW_SYSTEMS),
    ),
}
