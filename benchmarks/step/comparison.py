"""Our step beside every other system's, and adapting beside a placement that is kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch.distributed as dist

from benchmarks.common.across_ranks import slowest, total
from benchmarks.common.spread import median_of, pair_ratios, paired_ratio
from benchmarks.step.blocks import Blocks, take_turns
from benchmarks.step.effort import Effort
from benchmarks.step.systems import FROZEN, SYSTEMS
from benchmarks.step.training import TrainingSystem
from benchmarks.step.workload import Workload

# The first of them also find memory and threads; their losses tell whether systems train alike.
WARM_UP_STEPS: Final = 3
# Of losses in nats a byte; systems add up in other orders.
_TOLERANCE: Final = 1e-4


def prepare(name: str, workload: Workload, expected: Sequence[float] | None) -> tuple[TrainingSystem, list[float]]:
    """A system and the losses of its first steps, the mean over ranks. A collective.

    Args:
        name: of the system.
        workload: what it trains.
        expected: ours; None where there are none yet.

    Raises:
        AssertionError: on all ranks, when losses differ from ours though nothing was dropped.
    """
    builder = SYSTEMS[name]
    system = builder.make(workload)
    losses = [loss / dist.get_world_size() for loss in total([float(system.step()) for _ in range(WARM_UP_STEPS)])]
    system.wait_for_weights()
    system.check_routing()
    if name == FROZEN:
        system.set_adapting(every_step=False)
    if expected is not None and not builder.drops:
        farthest = max(abs(loss - ours) for loss, ours in zip(losses, expected, strict=True))
        assert farthest <= _TOLERANCE, f"{name} trains otherwise: losses {losses}, and ours {list(expected)}"
    return system, losses


def compare_systems(
    ours: TrainingSystem,
    losses: list[float],
    workload: Workload,
    names: Sequence[str],
    effort: Effort,
    link_bytes: Callable[[], int] | None,
) -> dict[str, Any]:
    """Our step time over each system's, in blocks that alternate. One other system is there at a time. A collective.

    Args:
        ours: in training.
        losses: of our first steps.
        workload: what all train.
        names: of the other systems.
        effort: `pairs` and `steps`.
        link_bytes: as of `Blocks`.

    Returns:
        System -> its losses, `Blocks.summary` of it, "ours" (the same of ours beside it), and "ours_over_it".
    """
    results = {}
    for name in names:
        theirs, their_losses = prepare(name, workload, losses)
        for system in (ours, theirs):
            system.restart_routes()
        our_blocks, their_blocks = Blocks(link_bytes), Blocks(link_bytes)
        take_turns((our_blocks, ours), (their_blocks, theirs), effort.pairs, effort.steps)
        ratios = pair_ratios(slowest(our_blocks.wall), slowest(their_blocks.wall))
        results[name] = {
            "losses": their_losses,
            **their_blocks.summary(effort.steps),
            "ours": our_blocks.summary(effort.steps),
            "ours_over_it": median_of(ratios.tolist()),
        }
        del theirs, system, their_blocks
        gc.collect()
    return results


def compare_adapting(systems: tuple[TrainingSystem, TrainingSystem], effort: Effort) -> dict[str, Any]:
    """The cost of a new placement in every step, over keeping one that was made once from the same popularity.

    In each round both first adapt for a few steps, then one stops: it keeps a placement as good as the other's. In
    the next round they swap roles. The control is the same with both fixed: the distance of its ratio from 1 is the
    error of this machine's measurement. A collective.

    Args:
        systems: two alike under our engine.
        effort: `rounds`, `pairs` and `steps`.
    """
    results: dict[str, Any] = {}
    for name, adapts in (("adapting", True), ("control", False)):
        run, baseline = Blocks(), Blocks()
        for number in range(effort.rounds):
            roles = systems if number % 2 == 0 else systems[::-1]
            for system, adapts_on in zip(roles, (adapts, False), strict=True):
                system.set_adapting(every_step=True)
                for _ in range(WARM_UP_STEPS):
                    system.step()
                system.set_adapting(every_step=adapts_on)
                system.step()
                system.wait_for_weights()
            take_turns((run, roles[0]), (baseline, roles[1]), effort.pairs, effort.steps)
        walls = slowest(run.wall), slowest(baseline.wall)
        results[name] = {
            "ratio": median_of(pair_ratios(*walls).tolist()),
            "wall_ratio": paired_ratio(*walls),
            "cpu_ratio": paired_ratio(total(run.cpu), total(baseline.cpu)),
            "run": run.summary(effort.steps),
            "baseline": baseline.summary(effort.steps),
        }
    return results
