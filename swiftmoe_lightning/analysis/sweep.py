"""Slots and group sizes swept over a trace: how each would have fared. The placements are those of "balanced".

U steps, V source ranks, L layers, E experts, W ranks, g ranks of a group, R groups, s slots of a rank, d pairs of a
rank, G bytes of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from swiftmoe_lightning.analysis.candidates import CANDIDATES
from swiftmoe_lightning.analysis.cluster import Cluster
from swiftmoe_lightning.analysis.cost import Machine, phase_bytes
from swiftmoe_lightning.analysis.replay import Rules, replayed_loads
from swiftmoe_lightning.analysis.scale import SPARE
from swiftmoe_lightning.analysis.scale_advice import candidate_sizes
from swiftmoe_lightning.analysis.trace import Trace
from swiftmoe_lightning.placement import Capacity, ExpertLoad, imbalance

CAPACITY_FACTORS: Final = (1.0, 1.1, 1.25, 1.5, 2.0)
# Numbers of slots that are tried above the fewest, each a quarter of the fewest more than the last.
_MORE_SLOTS: Final = 5
# Of many layers, and of many groups, so many stand for all.
_MOST_LAYERS: Final = 4
_MOST_GROUPS: Final = 2
# A layer's step of one replay takes about a millisecond.
_MOST_LAYER_STEPS: Final = 12_000
# Of many steps, so many stretches of neighbouring ones stand for all. The first steps of a stretch teach the policy how
# popularity moves, and are not counted.
_STRETCHES: Final = 4
_LEARNING_STEPS: Final = 8
_SHORTEST_STRETCH: Final = 2 * _LEARNING_STEPS


@dataclass(frozen=True, kw_only=True)
class Point:
    """A group size and a number of slots, and how the trace would have fared. Means over steps, layers and groups.

    Attributes:
        group_size: g.
        slots_per_rank: s.
        imbalance: the busiest rank's load over the mean rank's, where nothing is dropped.
        dropped: capacity factor -> share of the assignments that is over the ranks' budgets.
        pairs: d of a rank and layer.
        group_bytes: what a rank sends in a step within its group, in both weight phases of all layers.
        across_bytes: as `group_bytes`, to other groups.
        slot_bytes: a rank's memory for the weights in its slots, all layers.
        state_bytes: a rank's memory for its part of all experts' optimizer state.
        seconds: of a step, all layers, phase after phase: weights and tokens on the wire, and the busiest rank's
            experts where its speed is known.
    """

    group_size: int
    slots_per_rank: int
    imbalance: float
    dropped: dict[float, float]
    pairs: float
    group_bytes: float
    across_bytes: float
    slot_bytes: float
    state_bytes: float
    seconds: float

    @property
    def sent_bytes(self) -> float:
        """What a rank sends in both weight phases of a step."""
        return self.group_bytes + self.across_bytes

    @property
    def resident_bytes(self) -> float:
        """A rank's memory for experts."""
        return self.slot_bytes + self.state_bytes


@dataclass(frozen=True, eq=False)
class Sweep:
    """What was swept.

    Attributes:
        trace: the recording.
        machine: its ranks and their speeds; its slots are not looked at.
        cluster: their links and memory.
        lag: as in `PlanOptions`.
    """

    trace: Trace
    machine: Machine
    cluster: Cluster
    lag: int = 1

    @property
    def group_sizes(self) -> list[int]:
        """Every g whose groups' own tokens the trace tells; smallest first."""
        num_ranks, sources = self.cluster.num_ranks, self.trace.num_sources
        return [g for g in candidate_sizes(self.cluster) if g == num_ranks or sources % (num_ranks // g) == 0]

    @property
    def unknown_sizes(self) -> list[int]:
        """Every g that groups could have, but whose groups' own tokens the trace does not tell."""
        return [g for g in candidate_sizes(self.cluster) if g not in self.group_sizes]

    @property
    def layers(self) -> list[int]:
        """The layers that stand for all."""
        return _evenly(self.trace.num_layers, _MOST_LAYERS)

    @property
    def stretches(self) -> list[range]:
        """The rows of the trace that are replayed, as stretches of neighbours."""
        replays = sum(len(self.slots_of(g)) * len(self._groups_of(g)) for g in self.group_sizes)
        return stretches(self.trace.num_steps, _MOST_LAYER_STEPS // (replays * len(self.layers)))

    @property
    def most_bytes(self) -> float:
        """A rank's memory, but for a share of `SPARE` for what is not counted."""
        return (1 - SPARE) * self.cluster.gpu_bytes

    def slots_of(self, group_size: int) -> list[int]:
        """The numbers of slots of a rank that are tried; fewest first."""
        return slot_numbers(self.trace.num_experts, group_size)

    def points(self, report: Callable[[str], None] | None = None) -> list[Point]:
        """How each group size and number of slots would have fared.

        Args:
            report: called with a phrase before each group size is replayed.
        """
        found = []
        for group_size in self.group_sizes:
            if report is not None:
                report(f"groups of {group_size}")
            found += [self._point(group_size, slots) for slots in self.slots_of(group_size)]
        return found

    def _groups_of(self, group_size: int) -> list[int]:
        """The groups that stand for all."""
        return _evenly(self.cluster.num_ranks // group_size, _MOST_GROUPS)

    def _point(self, group_size: int, slots: int) -> Point:
        loads = list(self._loads(group_size, slots))
        total = sum(load.num_assignments for load in loads)
        wanted = np.array([load.wanted_W for load in loads])
        # A capacity changes neither placements nor splits, so one replay serves every factor.
        dropped = {factor: sum(_num_over(load, Capacity(factor)) for load in loads) for factor in CAPACITY_FACTORS}
        pairs = float(np.mean([load.placement.num_pairs for load in loads])) / group_size
        trace, machine, num_ranks = self.trace, self.machine, self.cluster.num_ranks
        of_group = Machine(num_ranks=group_size, slots_per_rank=slots, expert_bytes=machine.expert_bytes)
        owned = trace.num_experts / num_ranks
        busiest = float(imbalance(wanted).mean())
        return Point(
            group_size=group_size,
            slots_per_rank=slots,
            imbalance=busiest,
            dropped={factor: number / max(total, 1) for factor, number in dropped.items()},
            pairs=pairs,
            group_bytes=2 * trace.num_layers * phase_bytes(pairs, of_group),
            across_bytes=2 * trace.num_layers * machine.expert_bytes * owned * (num_ranks // group_size - 1),
            slot_bytes=trace.num_layers * slots * machine.expert_bytes,
            state_bytes=trace.num_layers * owned * machine.moved_state_bytes,
            seconds=trace.num_layers * self._layer_seconds(group_size, pairs, busiest),
        )

    def _loads(self, group_size: int, slots: int) -> Iterator[ExpertLoad]:
        """The loads that count: of each group, stretch, step and layer."""
        candidate, num_groups = CANDIDATES["balanced"], self.cluster.num_ranks // group_size
        sources = max(self.trace.num_sources // num_groups, 1)
        for group in self._groups_of(group_size):
            counts_UVLE = self.trace.counts_UWLE[:, group * sources : (group + 1) * sources, self.layers]
            for rows in self.stretches:
                popularity_ULE = counts_UVLE[rows.start : rows.stop].sum(1)
                policy = candidate.make(group_size, slots)
                rules = Rules(split=candidate.split, lag=self.lag)
                for step, loads in enumerate(replayed_loads(popularity_ULE, policy, rules)):
                    if step >= _LEARNING_STEPS or len(rows) < _SHORTEST_STRETCH:
                        yield from loads

    def _layer_seconds(self, group_size: int, pairs: float, busiest: float) -> float:
        """Of one layer and step; messages as in `GroupCost`, with the pairs and assignments of the trace."""
        cluster, machine = self.cluster, self.machine
        assignments = float(self.trace.popularity_ULE.sum(2).mean()) / cluster.num_ranks
        owned = self.trace.num_experts * machine.expert_bytes / cluster.num_ranks
        seconds = 2 * cluster.in_group_seconds(group_size, pairs * machine.expert_bytes / group_size)
        seconds += 2 * cluster.between_groups_seconds(group_size, owned)
        seconds += 4 * cluster.in_group_seconds(group_size, assignments * machine.assignment_bytes / group_size)
        if machine.flops is not None:
            seconds += busiest * assignments * machine.flops_of_assignment / machine.flops
        return seconds


def slot_numbers(num_experts: int, group_size: int) -> list[int]:
    """Numbers of slots to try: the fewest that hold all experts, then more in even steps; never more than E.

    Args:
        num_experts: E.
        group_size: g.
    """
    fewest = -(-num_experts // group_size)
    step = max(fewest // 4, 1)
    return [slots for slots in range(fewest, fewest + _MORE_SLOTS * step + 1, step) if slots <= num_experts]


def stretches(num_steps: int, num_rows: int) -> list[range]:
    """Stretches of neighbouring steps, evenly spread from the first step to the last.

    Args:
        num_steps: of the trace.
        num_rows: about how many to take.
    """
    length = max(num_rows // _STRETCHES, _SHORTEST_STRETCH)
    if length * _STRETCHES >= num_steps:
        return [range(num_steps)]
    starts = np.linspace(0, num_steps - length, _STRETCHES).astype(int).tolist()
    return [range(start, start + length) for start in starts]


def _num_over(load: ExpertLoad, capacity: Capacity) -> int:
    """Assignments over the ranks' budgets."""
    budget = capacity.budget(load.num_assignments, load.placement)
    return int(np.maximum(load.wanted_W - budget, 0).sum())


def _evenly(number: int, most: int) -> list[int]:
    """At most so many of 0 .. number - 1, the first and the last among them."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int)).tolist()
