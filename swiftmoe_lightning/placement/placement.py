"""Which expert each slot holds, for one layer and one step.

W ranks, s slots of a rank, S = W * s slots, E experts, P pairs: the (rank, expert) pairs in which the rank has a
replica of the expert, each counted once. The paper writes N for W.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swiftmoe_lightning.placement.replication import uniform_replica_counts


@dataclass(frozen=True, eq=False)
class Placement:
    """Slots -> experts. Slot i lives on rank i // s; several slots of one rank may hold the same expert.

    Attributes:
        slot_to_expert_S: [S] int64, the expert in each slot.
        num_experts: E. Every expert is in at least one slot.
        world_size: W; S is a multiple of it.

    Raises:
        ValueError: for a table that does not fit W, holds an unknown expert, or leaves an expert without a slot.
    """

    slot_to_expert_S: np.ndarray
    num_experts: int
    world_size: int

    def __post_init__(self) -> None:
        table = np.array(self.slot_to_expert_S, dtype=np.int64)
        object.__setattr__(self, "slot_to_expert_S", table)
        if table.ndim != 1 or table.size == 0 or table.size % self.world_size:
            raise ValueError(
                f"slot_to_expert_S must be one row of world_size x slots_per_rank entries, got shape {table.shape} "
                f"for {self.world_size} ranks. Give every rank the same number of slots."
            )
        if table.min() < 0 or table.max() >= self.num_experts:
            raise ValueError(
                f"slot_to_expert_S holds experts {table.min()}..{table.max()}, but there are {self.num_experts}: "
                f"use ids 0..{self.num_experts - 1}."
            )
        if not self.replica_counts_E.all():
            missing = np.flatnonzero(self.replica_counts_E == 0).tolist()
            raise ValueError(f"experts {missing} have no slot. Every expert needs at least one replica.")

    @classmethod
    def uniform(cls, num_experts: int, world_size: int, slots_per_rank: int) -> Placement:
        """The same number of replicas for every expert (or one more, for the first ones), laid out expert by expert.

        Args:
            num_experts: E.
            world_size: W.
            slots_per_rank: s.

        Raises:
            ValueError: when the W * s slots cannot hold every expert once.
        """
        counts_E = uniform_replica_counts(num_experts, world_size * slots_per_rank)
        return cls(np.repeat(np.arange(num_experts), counts_E), num_experts, world_size)

    @property
    def slots_per_rank(self) -> int:
        """s = S / W."""
        return self.slot_to_expert_S.size // self.world_size

    @property
    def table_Ws(self) -> np.ndarray:
        """[W, s] int64: the expert in each slot of each rank."""
        return self.slot_to_expert_S.reshape(self.world_size, -1)

    @cached_property
    def replica_counts_E(self) -> np.ndarray:
        """[E] int64: in how many slots each expert is."""
        return np.bincount(self.slot_to_expert_S, minlength=self.num_experts)

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        rank_S = np.repeat(np.arange(self.world_size), self.slots_per_rank)
        return np.unique(rank_S * self.num_experts + self.slot_to_expert_S, return_counts=True)

    @property
    def num_pairs(self) -> int:
        """P."""
        return len(self._pairs[0])

    @cached_property
    def pair_rank_P(self) -> np.ndarray:
        """[P] int64: the rank of each pair; pairs are ordered by (rank, expert)."""
        return self._pairs[0] // self.num_experts

    @cached_property
    def pair_expert_P(self) -> np.ndarray:
        """[P] int64: the expert of each pair."""
        return self._pairs[0] % self.num_experts

    @property
    def pair_slots_P(self) -> np.ndarray:
        """[P] int64: how many slots of the pair's rank have its expert; they sum to S."""
        return self._pairs[1]

    @cached_property
    def by_expert_P(self) -> np.ndarray:
        """[P] int64: indices of the pairs in the order (expert, rank), so that an expert's pairs are neighbours."""
        return np.argsort(self.pair_expert_P, kind="stable")

    @cached_property
    def first_pair_E(self) -> np.ndarray:
        """[E] int64: where each expert's pairs begin in `by_expert_P`."""
        return np.searchsorted(self.pair_expert_P[self.by_expert_P], np.arange(self.num_experts))

    @cached_property
    def is_first_pair_P(self) -> np.ndarray:
        """[P] bool: whether a pair is the first of its expert, in rank order."""
        is_first_P = np.zeros(self.num_pairs, dtype=bool)
        is_first_P[self.by_expert_P[self.first_pair_E]] = True
        return is_first_P

    @cached_property
    def num_pairs_W(self) -> np.ndarray:
        """[W] int64: pairs of each rank, which are the different experts on it; they sum to P."""
        return np.bincount(self.pair_rank_P, minlength=self.world_size)

    @cached_property
    def first_pair_W(self) -> np.ndarray:
        """[W] int64: where each rank's pairs begin."""
        return self.num_pairs_W.cumsum() - self.num_pairs_W

    def pairs_of(self, first: int, stop: int) -> slice:
        """Where the pairs of the ranks first..stop-1 lie.

        Args:
            first: a rank, or W for none.
            stop: one more than a rank, at least `first`. Beyond W there are no more.
        """
        ends = [int(self.first_pair_W[rank]) if rank < self.world_size else self.num_pairs for rank in (first, stop)]
        return slice(*ends)

    def experts_of(self, rank: int) -> np.ndarray:
        """[d] int64: the experts on `rank`, ascending. The i-th of them uses the i-th row of the rank's slots."""
        return self.pair_expert_P[self.pairs_of(rank, rank + 1)]

    def sum_by_rank(self, values_xP: np.ndarray) -> np.ndarray:
        """[..., P] of each pair -> [..., W] of each rank; every rank has at least one pair.

        Args:
            values_xP: [..., P], in the order of `pair_rank_P`.
        """
        return np.add.reduceat(values_xP, self.first_pair_W, axis=-1)

    def arrivals(self, later: Placement) -> np.ndarray:
        """[P] bool: which pairs of `later` this placement does not have: replicas that arrive on a new rank.

        Args:
            later: a placement of the same experts on the same ranks.
        """
        return np.isin(later._pairs[0], self._pairs[0], assume_unique=True, invert=True)

    def num_moved(self, later: Placement) -> int:
        """How many replicas arrive on a new rank: see `arrivals`.

        Args:
            later: a placement of the same experts on the same ranks.
        """
        return int(self.arrivals(later).sum())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placement)
            and (self.num_experts, self.world_size) == (other.num_experts, other.world_size)
            and np.array_equal(self.slot_to_expert_S, other.slot_to_expert_S)
        )

    def __hash__(self) -> int:
        return hash((self.slot_to_expert_S.tobytes(), self.num_experts, self.world_size))
