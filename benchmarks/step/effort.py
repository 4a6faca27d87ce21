"""How much the step benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.command_line import setting
from benchmarks.common.links import Links
from benchmarks.step.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How many measurements to make."""

    ranks: int = setting(4, "gloo processes")
    pairs: int = setting(3, "measured of two systems, two blocks of each")
    steps: int = setting(3, "in a block")
    rounds: int = setting(3, "times that adapting and kept placements swap roles")
    repeats: int = setting(20, "steps that are split into phases, updates, and weight exchanges alone")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured, on every rank.

    Attributes:
        workload: what all systems train.
        effort: how often.
        systems: those that ours is compared with.
        links: between the ranks, made before; None is the machine's own loopback.
        chrome_trace: the file for two steps of rank 0.
    """

    workload: Workload
    effort: Effort
    systems: tuple[str, ...]
    links: Links | None
    chrome_trace: Path
