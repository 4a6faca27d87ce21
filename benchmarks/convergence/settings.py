"""What is trained: one setting is one model on one emulated cluster, for every system and seed alike."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Self


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One training.

    Attributes:
        corpus: one of `corpus.CORPORA`.
        num_ranks: W.
        slots_per_rank: s.
        num_experts: E.
        top_k: K.
        capacity_factor: None is dropless.
        aux_loss_coef: weight of the load-balancing loss.
        bias_update_rate: of the routers' biases; 0 has none.
        num_layers: blocks of attention and experts.
        dim: D.
        hidden_dim: F of each expert.
        seq_len: bytes of a sequence.
        sequences_per_rank: in one step.
        num_steps: optimizer steps.
        warm_up: steps in which the learning rate rises; then it stays.
        lr: AdamW's.
        validate_every: steps.
        num_validation: sequences, evenly spread over the validation text.
    """

    corpus: str = "mix"
    num_ranks: int = 16
    slots_per_rank: int = 4
    num_experts: int = 16
    top_k: int = 1
    capacity_factor: float | None = 1.0
    aux_loss_coef: float = 1e-5
    bias_update_rate: float = 0.0
    num_layers: int = 4
    dim: int = 64
    hidden_dim: int = 512
    seq_len: int = 128
    sequences_per_rank: int = 1
    num_steps: int = 800
    warm_up: int = 50
    lr: float = 3e-3
    validate_every: int = 25
    num_validation: int = 64

    @property
    def key(self) -> str:
        """Names the setting in file names."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def num_sequences(self) -> int:
        """Sequences of one step, all ranks."""
        return self.num_ranks * self.sequences_per_rank

    @property
    def expert_share(self) -> float:
        """Share of the blocks' parameters that experts have."""
        experts = self.num_experts * 3 * self.dim * self.hidden_dim
        return experts / (experts + 4 * self.dim**2 + self.num_experts * self.dim)

    def over(self, num_ranks: int) -> Self:
        """The same slots and sequences of a step, over another number of ranks.

        Args:
            num_ranks: W.

        Raises:
            ValueError: where they cannot be divided evenly.
        """
        slots = self.num_ranks * self.slots_per_rank
        if num_ranks < 1 or slots % num_ranks or self.num_sequences % num_ranks:
            raise ValueError(
                f"{slots} slots and {self.num_sequences} sequences a step cannot be divided over {num_ranks} ranks. "
                "Choose a number of ranks that divides both."
            )
        return replace(
            self,
            num_ranks=num_ranks,
            slots_per_rank=slots // num_ranks,
            sequences_per_rank=self.num_sequences // num_ranks,
        )
