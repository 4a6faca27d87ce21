"""Bytes and seconds of a step's phases: ours, and the paper's (SYMI, arXiv 2504.19925, section 3 and appendix).

W ranks (the paper's N), E experts, s slots of a rank, S = W * s, P (rank, expert) pairs, d pairs of one rank.
G: bytes of one expert's gradient. Its weights are taken to have as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from swiftmoe_lightning.config import check_whole
from swiftmoe_lightning.placement import Placement

# Below it, sums over all experts and ranks stay finite, and precise enough.
_MOST_BYTES: Final = 2**50


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The ranks that a trace is replayed on.

    Without both `link_bytes` and `flops` no step times are modelled.

    Attributes:
        num_ranks: W.
        slots_per_rank: s.
        expert_bytes: G.
        state_bytes: an expert's optimizer state; None takes 8 G, the paper's 16 bytes a parameter of 2.
        link_bytes: bytes a second that a rank can send while it receives as many.
        flops: floating-point operations a second of a rank.
        assignment_flops: operations of one assignment, forward and backward; None takes 3 G: 6 a parameter of 2 bytes.
        assignment_bytes: bytes of one token's hidden state on the wire; it travels four times a step.

    Raises:
        ValueError: for a value out of range.
    """

    num_ranks: int
    slots_per_rank: int
    expert_bytes: int = 1_000_000
    state_bytes: int | None = None
    link_bytes: float | None = None
    flops: float | None = None
    assignment_flops: float | None = None
    assignment_bytes: int = 0

    def __post_init__(self) -> None:
        check_whole(num_ranks=self.num_ranks, slots_per_rank=self.slots_per_rank, expert_bytes=self.expert_bytes)
        check_whole(0, assignment_bytes=self.assignment_bytes, state_bytes=self.moved_state_bytes)
        for name, size in (("expert_bytes", self.expert_bytes), ("assignment_bytes", self.assignment_bytes)):
            if size > _MOST_BYTES:
                raise ValueError(f"{name} must be at most 2**50, got {size}. Give the bytes of one.")
        if self.moved_state_bytes > 8 * _MOST_BYTES:
            raise ValueError(
                f"state_bytes must be at most 2**53, got {self.state_bytes}. Give the bytes of one expert."
            )
        for name in ("link_bytes", "flops", "assignment_flops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value!r}.")
        if (self.link_bytes is None) != (self.flops is None):
            raise ValueError(
                "step times need the speed of links and of ranks. Give both link_bytes and flops, or none."
            )

    @property
    def moved_state_bytes(self) -> int:
        """Bytes of an expert's optimizer state, on its way to a new rank."""
        return 8 * self.expert_bytes if self.state_bytes is None else self.state_bytes

    @property
    def flops_of_assignment(self) -> float:
        """Operations of one assignment, forward and backward."""
        return 3 * self.expert_bytes if self.assignment_flops is None else self.assignment_flops


def phase_bytes(num_pairs: float, machine: Machine) -> float:
    """What collect, or distribute, puts on the wire in one layer, all ranks together: G (P - P / W).

    Args:
        num_pairs: P, or its mean.
        machine: the ranks.
    """
    return machine.expert_bytes * num_pairs * (1 - 1 / machine.num_ranks)


def paper_bytes(num_pairs: float, num_experts: int, machine: Machine) -> float:
    """Both phases of one layer, sent the paper's way with the same placement.

    Gradients: an all-reduce over each expert's ranks and one fetch of every shard, G (2 P - E - P / W). Weights: point
    to point to every slot, G S (1 - 1 / W).

    Args:
        num_pairs: P, or its mean.
        num_experts: E.
        machine: the ranks.

    Returns:
        Bytes, all ranks together.
    """
    num_ranks = machine.num_ranks
    gradients = 2 * num_pairs - num_experts - num_pairs / num_ranks
    return machine.expert_bytes * (gradients + machine.slots_per_rank * (num_ranks - 1))


def busiest_phase(placement: Placement) -> float:
    """The most that a rank sends or receives in one of the two phases, in units of G.

    In collect, a rank with d pairs sends their gradients' shards to the W - 1 other ranks, and receives its own shard
    of the P - d pairs of others: max(d (W - 1), P - d) / W. Distribute is the same with the directions swapped.
    """
    num_pairs_W, num_ranks = placement.num_pairs_W, placement.world_size
    return float(np.maximum(num_pairs_W * (num_ranks - 1), num_pairs_W.sum() - num_pairs_W).max() / num_ranks)


def step_seconds(max_load: float, busiest: float, moved: float, machine: Machine) -> float | None:
    """One layer's part of a step, phase after phase: without overlap, and without latencies.

    Args:
        max_load: assignments of the busiest rank.
        busiest: see `busiest_phase`.
        moved: experts whose optimizer state moves to a new rank; they are received in parallel by all ranks.
        machine: the ranks.

    Returns:
        Seconds, or None without speeds.
    """
    if machine.flops is None or machine.link_bytes is None:
        return None
    away = 1 - 1 / machine.num_ranks
    sent = 2 * busiest * machine.expert_bytes
    sent += 4 * max_load * machine.assignment_bytes * away
    sent += moved * (machine.moved_state_bytes + machine.expert_bytes) / machine.num_ranks
    return max_load * machine.flops_of_assignment / machine.flops + sent / machine.link_bytes


def paper_step_seconds(max_load: float, machine: Machine) -> float | None:
    """`step_seconds` with the paper's bound for both phases: each rank moves (S - s) / W gradients and as many weights.

    Args:
        max_load: assignments of the busiest rank.
        machine: the ranks.

    Returns:
        Seconds, or None without speeds.
    """
    num_ranks, slots = machine.num_ranks, machine.slots_per_rank
    return step_seconds(max_load, slots * (num_ranks - 1) / num_ranks, 0.0, machine)
