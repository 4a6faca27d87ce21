"""Runs of one setting, compared: drops, and steps and time to the losses that static reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from benchmarks.common.spread import median_of
from benchmarks.convergence.presets import FLEXMOE
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.times import modelled_seconds, paper_step_times
from benchmarks.convergence.training import Run
from swiftmoe_lightning.analysis.time_to_loss import position_of, saved, target_loss

# Of static's steps: the losses it has there are the targets. The headline is the mean of the last two.
SHARES: Final = (0.25, 0.5, 0.75, 1.0)
_HEADLINE_SHARES: Final = (0.75, 1.0)


class Comparison:
    """All systems' runs from one seed.

    Args:
        setting: what they trained.
        runs: system -> its run; static is among them.
        measured: system -> step time in steps of static, as measured on real ranks; may be empty.
    """

    def __init__(self, setting: Setting, runs: Mapping[str, Run], measured: Mapping[str, float]) -> None:
        self._runs = runs
        # (system, kind) -> [S + 1] seconds after each number of steps.
        self._clocks = {
            (system, kind): np.append(0.0, np.cumsum(times_S))
            for system, run in runs.items()
            for kind, times_S in _times_by_kind(run, setting, measured).items()
        }

    def kinds(self, system: str) -> list[str]:
        """The kinds of time that are known for a system."""
        return [kind for known, kind in self._clocks if known == system]

    def steps_saved(self, system: str, share: float) -> float:
        """Share of static's steps that a system saves to the loss that static has after `share` of them."""
        return saved(self._steps_to(system, share), self._steps_to("static", share))

    def time_saved(self, system: str, share: float, kind: str, over: Sequence[str]) -> float:
        """Share of time that a system saves to that loss, over the fastest of some others.

        One that never gets there has taken its whole run, and is no faster than that.

        Args:
            system: which.
            share: of static's steps.
            kind: of time: "paper", "modelled" or "measured".
            over: the others.
        """
        baseline = min(min(self._seconds_to(other, share, kind), self._clocks[other, kind][-1]) for other in over)
        return saved(self._seconds_to(system, share, kind), baseline)

    def drops_saved(self, system: str, over: str) -> float:
        """Share of dropped assignments that a system saves over another."""
        return 1 - self.drops(system) / self.drops(over)

    def drops(self, system: str) -> float:
        """Share of assignments that a system drops, all steps."""
        return float(np.mean(self._runs[system].dropped))

    def headline(self, system: str) -> dict[str, float]:
        """The figures of a system by name, each the mean over static's losses at 75 and 100 % of its steps."""
        flexmoe = [name for name in FLEXMOE if name in self._runs]
        figures = {"steps_saved_over_static": self._mean(lambda share: self.steps_saved(system, share))}
        for kind in self.kinds(system):
            name = "time_saved" if kind == "paper" else f"{kind}_time_saved"
            figures[f"{name}_over_static"] = self._mean(
                lambda share, kind=kind: self.time_saved(system, share, kind, ["static"])
            )
            known = [other for other in flexmoe if (other, kind) in self._clocks]
            if known:
                figures[f"{name}_over_flexmoe"] = self._mean(
                    lambda share, kind=kind, known=known: self.time_saved(system, share, kind, known)
                )
        figures["drops_saved_over_static"] = self.drops_saved(system, "static")
        if "flexmoe-10" in flexmoe:
            figures["drops_saved_over_flexmoe_10"] = self.drops_saved(system, "flexmoe-10")
        return figures

    @staticmethod
    def _mean(figure: Any) -> float:
        return sum(figure(share) for share in _HEADLINE_SHARES) / len(_HEADLINE_SHARES)

    def _target(self, share: float) -> float:
        static = self._runs["static"]
        return target_loss(share, static.validation_steps, static.validation_loss)

    def _steps_to(self, system: str, share: float) -> float:
        run = self._runs[system]
        return position_of(self._target(share), run.validation_steps, run.validation_loss)

    def _seconds_to(self, system: str, share: float, kind: str) -> float:
        run, clock = self._runs[system], self._clocks[system, kind]
        return position_of(self._target(share), clock[run.validation_steps].tolist(), run.validation_loss)


def _times_by_kind(run: Run, setting: Setting, measured: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Kind -> [S] the time of each step, of the kinds that are known of the run's system."""
    num_steps, paper = len(run.train_loss), paper_step_times()
    times = {"paper": np.full(num_steps, paper[run.system]), "modelled": modelled_seconds(run, setting)}
    if run.system in measured:
        times["measured"] = np.full(num_steps, measured[run.system])
    return times


def headlines(setting: Setting, runs: Mapping[int, Mapping[str, Run]], measured: Mapping[str, float]) -> dict[str, Any]:
    """System -> figure -> median, least, most and number over seeds, JSON-able; static is what they are over.

    Args:
        setting: what was trained.
        runs: seed -> system -> its run.
        measured: as of `Comparison`.
    """
    comparisons = [Comparison(setting, by_system, measured) for by_system in runs.values()]
    systems = [system for system in next(iter(runs.values())) if system != "static"]
    figures_of = {system: [comparison.headline(system) for comparison in comparisons] for system in systems}
    return {
        system: {name: median_of([figures[name] for figures in by_seed]) for name in by_seed[0]}
        for system, by_seed in figures_of.items()
    }
