"""Policies compared on a trace: what each would have dropped, sent and moved. U steps, L layers, E experts, W ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from swiftmoe_lightning.analysis.candidates import CANDIDATES, Candidate
from swiftmoe_lightning.analysis.cost import Machine, paper_bytes, paper_step_seconds, phase_bytes, step_seconds
from swiftmoe_lightning.analysis.replay import Replay, Rules, replay
from swiftmoe_lightning.analysis.trace import Trace, check_bytes
from swiftmoe_lightning.config import SwiftMoEConfig, check_choice, check_whole
from swiftmoe_lightning.placement import Capacity, Placement, drop_bounds, imbalance_bounds

DEFAULT_POLICIES: Final = ("balanced", "packed", "symi", "static")
_MOST_SLOTS: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How the policies are run.

    Attributes:
        policies: names of `CANDIDATES`.
        capacity_factor: None is dropless.
        capacity_per: what has a budget, "rank" or "slot"; None takes each policy's own (see `Candidate`).
        lag: rows between the step that a plan is made from and the one that it serves; 0 is an oracle's.
        replace_every: as in `SwiftMoEConfig`.

    Raises:
        ValueError: for a value out of range.
    """

    policies: Sequence[str] = DEFAULT_POLICIES
    capacity_factor: float | None = None
    capacity_per: str | None = None
    lag: int = 1
    replace_every: int | str = 1

    def __post_init__(self) -> None:
        check_whole(0, lag=self.lag)
        # A run has the same setting, with the same check.
        SwiftMoEConfig(replace_every=self.replace_every)  # type: ignore[arg-type]
        if not self.policies:
            raise ValueError(f"name at least one policy of {', '.join(CANDIDATES)}.")
        for name in self.policies:
            check_choice("policy", name, tuple(CANDIDATES))
        if self.capacity_per is not None:
            check_choice("capacity_per", self.capacity_per, ("rank", "slot"))
        if self.capacity_factor is not None:
            Capacity(self.capacity_factor)

    def rules(self, candidate: Candidate) -> Rules:
        """How this candidate is run."""
        capacity = None
        if self.capacity_factor is not None:
            capacity = Capacity(self.capacity_factor, self.capacity_per or candidate.capacity_per)
        return Rules(
            split=candidate.split,
            capacity=capacity,
            lag=0 if candidate.is_oracle else self.lag,
            interval=self.replace_every,
        )


@dataclass(frozen=True, eq=False)
class Outcome:
    """A candidate's replay, and what it costs on the machine.

    Bytes are means of a step, all layers and ranks together.

    Attributes:
        candidate: the policy.
        rules: how it was run.
        replay: what it did.
        bytes_gradients: collecting gradients.
        bytes_weights: distributing weights.
        bytes_paper: both phases, the paper's way, with the same placements.
        bytes_state_moved: optimizer state and weights of experts that are new on a rank, if the candidate moves them.
        seconds: modelled seconds of a step; None without speeds.
        seconds_paper: the same, with both phases at the paper's bound.
    """

    candidate: Candidate
    rules: Rules
    replay: Replay
    bytes_gradients: int
    bytes_weights: int
    bytes_paper: int
    bytes_state_moved: int
    seconds: float | None
    seconds_paper: float | None


@dataclass(frozen=True, eq=False)
class Plan:
    """Policies compared on a trace.

    Attributes:
        trace: what was replayed.
        machine: on which ranks.
        options: how the policies were run.
        outcomes: by policy.
        bounds: the least share "dropped", and max / mean load ("imbalance"), of any placement that knows the step.
    """

    trace: Trace
    machine: Machine
    options: PlanOptions
    outcomes: dict[str, Outcome]
    bounds: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """Numbers only, by policy; means over all steps and layers."""
        num_assignments = int(self.trace.popularity_ULE.sum())
        return {
            "policies": {name: _numbers(outcome, num_assignments) for name, outcome in self.outcomes.items()},
            "bounds": self.bounds,
            "trace": {
                "steps": self.trace.num_steps,
                "layers": self.trace.num_layers,
                "experts": self.trace.num_experts,
                "assignments": num_assignments,
            },
            "ranks": self.machine.num_ranks,
            "slots_per_rank": self.machine.slots_per_rank,
            "capacity_factor": self.options.capacity_factor,
            "lag": self.options.lag,
            "expert_bytes": self.machine.expert_bytes,
        }


def make_plan(
    trace: Trace, machine: Machine, options: PlanOptions, report: Callable[[str], None] | None = None
) -> Plan:
    """Run every policy on the trace.

    Args:
        trace: the assignments.
        machine: the ranks to replay it on.
        options: how the policies are run.
        report: called with a policy's name before it is run.

    Raises:
        ValueError: when the slots cannot hold the experts, or the replays would not fit the memory.
    """
    _check_size(trace, machine)
    popularity_ULE = trace.popularity_ULE
    # The bounds come first: they raise at once when the slots are too few.
    bounds = _bounds(popularity_ULE, machine, options.capacity_factor)
    outcomes = {}
    for name in options.policies:
        if report is not None:
            report(name)
        candidate = CANDIDATES[name]
        rules = options.rules(candidate)
        policy = candidate.make(machine.num_ranks, machine.slots_per_rank)
        outcomes[name] = _outcome(candidate, rules, replay(popularity_ULE, policy, rules), machine, trace.num_experts)
    return Plan(trace, machine, options, outcomes, bounds)


def _check_size(trace: Trace, machine: Machine) -> None:
    """Refuse what would fill the memory: one layer's slots, and a replay's arrays [U, L, W] and [U, L, E]."""
    if (num_slots := machine.num_ranks * machine.slots_per_rank) > _MOST_SLOTS:
        raise ValueError(f"{num_slots} slots on all ranks are more than {_MOST_SLOTS}. Plan for fewer ranks or slots.")
    check_bytes("a replay", 8 * trace.num_steps * trace.num_layers * (2 * machine.num_ranks + trace.num_experts))


def _outcome(candidate: Candidate, rules: Rules, replayed: Replay, machine: Machine, num_experts: int) -> Outcome:
    num_steps, num_layers = replayed.num_pairs_UL.shape
    num_pairs = replayed.num_pairs_UL.sum() / num_steps
    # Distribute uses the next step's placement. Over a whole run the two means hardly differ, so one serves both.
    phase = round(phase_bytes(num_pairs, machine))
    moved_UL = replayed.moved_UL if candidate.moves_state else np.zeros_like(replayed.moved_UL)
    state = moved_UL.sum() / num_steps * (machine.moved_state_bytes + machine.expert_bytes)
    max_UL = replayed.load_ULW.max(2)
    seconds = [
        step_seconds(*layer, machine)
        for layer in zip(max_UL.flat, replayed.busiest_UL.flat, moved_UL.flat, strict=True)
    ]
    paper = [paper_step_seconds(max_load, machine) for max_load in max_UL.flat]
    return Outcome(
        candidate,
        rules,
        replayed,
        bytes_gradients=phase,
        bytes_weights=phase,
        bytes_paper=round(num_layers * paper_bytes(num_pairs / num_layers, num_experts, machine)),
        bytes_state_moved=round(state),
        seconds=_sum_of_step(seconds, num_steps),
        seconds_paper=_sum_of_step(paper, num_steps),
    )


def _sum_of_step(seconds: list[float | None], num_steps: int) -> float | None:
    known = [s for s in seconds if s is not None]
    return float(sum(known)) / num_steps if known else None


def _bounds(popularity_ULE: np.ndarray, machine: Machine, capacity_factor: float | None) -> dict[str, float]:
    """Means over all steps and layers of an oracle's best: whole replicas, at least one of every expert.

    As in a replay, a layer's step without tokens counts as even.
    """
    uniform = Placement.uniform(popularity_ULE.shape[2], machine.num_ranks, machine.slots_per_rank)
    no_load_W = np.zeros(machine.num_ranks, dtype=np.int64)
    dropped, imbalance = 0.0, []
    for popularity_E in popularity_ULE.reshape(-1, popularity_ULE.shape[2]):
        imbalance.append(imbalance_bounds(popularity_E, uniform, no_load_W).by_cause["prediction"])
        if capacity_factor is not None:
            total = int(popularity_E.sum())
            # Budgets of slots are rounded up one by one, so that a rank's may add up to a little more.
            budgets = [Capacity(capacity_factor, per).budget(total, uniform) for per in ("rank", "slot")]
            budget = max(budgets[0], budgets[1] * machine.slots_per_rank)
            dropped += total * drop_bounds(popularity_E, uniform, 0, budget, "rank").by_cause["prediction"]
    # With a capacity, dropping tokens can make loads as even as one likes.
    least = 1.0 if capacity_factor is not None else float(np.mean(imbalance))
    return {"dropped": dropped / float(popularity_ULE.sum()), "imbalance": least}


def _numbers(outcome: Outcome, num_assignments: int) -> dict[str, Any]:
    replayed = outcome.replay
    capacity = outcome.rules.capacity
    return {
        "dropped": float(replayed.dropped_UL.sum() / num_assignments),
        "imbalance": float(replayed.imbalance_UL.mean()),
        "imbalance_max": float(replayed.imbalance_UL.max()),
        "bytes_gradients": outcome.bytes_gradients,
        "bytes_weights": outcome.bytes_weights,
        "bytes_paper": outcome.bytes_paper,
        "bytes_state_moved": outcome.bytes_state_moved,
        "step_seconds": outcome.seconds,
        "step_seconds_paper": outcome.seconds_paper,
        "pairs": float(replayed.num_pairs_UL.mean()),
        "replicas_moved": float(replayed.moved_UL.sum(1).mean()),
        "planning_seconds": replayed.planning_seconds,
        "capacity_per": None if capacity is None else capacity.per,
        "token_split": outcome.rules.split,
        "label": outcome.candidate.label,
        "achieved": replayed.achieved,
        "losses": replayed.losses,
        "bounds": replayed.bounds,
    }
