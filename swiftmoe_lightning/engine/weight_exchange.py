"""One layer's two weight exchanges under way, leg by leg.

Between the ranks that own an expert's rows and those that have it in slots lie, from the owners on: the exchange
between expert groups, if there are several, and the stages inside the group. Weights take them in this order, gradients
backwards; each leg's result is what the next one sends.

E experts, r rows of a tensor that this rank owns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import PendingExchange, RankGroup, SideStream
from swiftmoe_lightning.engine.direct_exchange import DirectCollection, DirectDistribution, travels_directly
from swiftmoe_lightning.engine.packed_exchange import PackedCollection, PackedDistribution
from swiftmoe_lightning.engine.replica_exchange import ReplicaExchange
from swiftmoe_lightning.ops import reused_empty
from swiftmoe_lightning.placement import Placement

# What is sent: gradients in the expert group and between groups, then weights between groups and in the group; and
# pieces of experts for evaluation, and back.
PHASES: Final = ("collect", "reduce", "gather", "distribute", "recut")


@dataclass(frozen=True, eq=False)
class Stage:
    """An exchange of rows between the ranks of a group: each owns its part of them, and has some experts whole.

    Attributes:
        ranks: of the group.
        placement: which of them has which expert.
        arrives_P: [P] bool, the pairs whose weights are sent; None for all.
    """

    ranks: RankGroup
    placement: Placement
    arrives_P: np.ndarray | None = None

    def shapes(self, num_experts: int, tensors: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """Name -> [num_experts, this rank's rows, ...], of tensors [experts, rows, ...]."""
        shapes = {}
        for name, shape in tensors.items():
            own = self.ranks.own_rows(shape[1])
            shapes[name] = torch.Size((num_experts, own.stop - own.start, *shape[2:]))
        return shapes


@dataclass(frozen=True, eq=False)
class WeightPath:
    """All legs between this rank's rows of every expert and its slots.

    Attributes:
        stages: from the owners on.
        replicas: the ranks of other expert groups that share this rank's part of the rows; None for one group.
        stream: on which rows are packed, added up and copied.
        bytes_sent: of each of `PHASES`; counted here.
        arrives_E: [E] bool, the experts whose weights groups send each other; None for all.
    """

    stages: Sequence[Stage]
    replicas: RankGroup | None
    stream: SideStream
    bytes_sent: dict[str, int]
    arrives_E: np.ndarray | None = None

    def shapes(self, slots: Mapping[str, Tensor]) -> list[dict[str, torch.Size]]:
        """For each stage, name -> shape of the rows that it begins with: this rank's part, of all experts that come
        through."""
        whole = {name: slot.shape for name, slot in slots.items()}
        shapes = []
        for stage in reversed(self.stages):
            whole = stage.shapes(stage.placement.num_experts, whole)
            shapes.append(whole)
        return shapes[::-1]


class PendingDistribution:
    """A layer's weights on their way into this rank's slots.

    Args:
        shards: name -> [E, r, ...], this rank's rows. Nothing may write them before `finish()`.
        slots: name -> [s, rows, ...], which will have the weights; of the shards' dtype.
        path: from the ones to the others.
    """

    def __init__(self, shards: Mapping[str, Tensor], slots: Mapping[str, Tensor], path: WeightPath) -> None:
        self._slots, self._path = slots, path
        self._shapes = path.shapes(slots)
        self._gather: tuple[ReplicaExchange, PendingExchange] | None = None
        self._stage: DirectDistribution | PackedDistribution | None = None
        self._next_stage = 0
        self._rows: Mapping[str, Tensor] = shards
        if path.replicas is None:
            self._start_stage()
        else:
            replicas = ReplicaExchange(path.replicas, self._shapes[0], path.arrives_E)
            self._gather = replicas, replicas.start_gather(shards)
            path.bytes_sent["gather"] += self._gather[1].bytes_sent

    def _start_stage(self) -> None:
        number, stages = self._next_stage, self._path.stages
        stage, sent = stages[number], self._rows
        if number + 1 == len(stages):
            self._rows = self._slots
        else:
            some = next(iter(sent.values()))
            shapes = self._shapes[number + 1].items()
            self._rows = {name: reused_empty(shape, some.dtype, some.device) for name, shape in shapes}
        travel = DirectDistribution if travels_directly(self._rows, stage.ranks.size) else PackedDistribution
        self._stage = travel(sent, self._rows, stage.placement, stage.ranks, stage.arrives_P)
        self._path.bytes_sent["distribute"] += self._stage.bytes_sent
        self._next_stage += 1

    def advance(self) -> None:
        """Unless the last leg is under way: wait for the one that is, and begin the next."""
        if self._gather is not None:
            (replicas, gather), self._gather = self._gather, None
            self._rows = replicas.finish_gather(gather.wait())
            self._start_stage()
        elif self._next_stage < len(self._path.stages):
            assert self._stage is not None
            self._stage.finish()
            self._start_stage()

    def finish(self) -> None:
        """Wait until the slots have the weights, and what this rank sends has left."""
        while self._gather is not None or self._next_stage < len(self._path.stages):
            self.advance()
        assert self._stage is not None
        self._stage.finish()


class PendingCollection:
    """A layer's gradients on their way to the owners of their rows.

    Contributions are added in rank order, in float32 or wider, so sums do not depend on their arrival. On a GPU they
    are added on the side stream: the model's waits for them, and the CPU does not.

    Args:
        gradients: name -> [s, rows, ...], of this rank's slots. Nothing may write them any more.
        path: from the owners to the slots.
        wire_dtype: in which gradients travel.

    Attributes:
        discarded: names of gradients that the user has discarded meanwhile.
    """

    def __init__(self, gradients: Mapping[str, Tensor], path: WeightPath, wire_dtype: torch.dtype) -> None:
        self._path, self._wire_dtype = path, wire_dtype
        self._part_shapes = path.shapes(gradients)[0]
        self._stages = list(path.stages)
        self._stage: DirectCollection | PackedCollection | None = None
        self._sum: tuple[ReplicaExchange, PendingExchange] | None = None
        self._totals: Mapping[str, Tensor] | None = None
        self.discarded: set[str] = set()
        self._start_stage(gradients)

    def _start_stage(self, gradients: Mapping[str, Tensor]) -> None:
        stage, dtype = self._stages.pop(), next(iter(gradients.values())).dtype
        is_direct = dtype == self._wire_dtype and dtype.itemsize >= torch.float32.itemsize
        if is_direct and travels_directly(gradients, stage.ranks.size):
            self._stage = DirectCollection(gradients, stage.placement, stage.ranks)
        else:
            self._stage = PackedCollection(gradients, stage.placement, stage.ranks, self._wire_dtype)
        self._path.bytes_sent["collect"] += self._stage.bytes_sent

    def advance(self) -> bool:
        """Wait for the leg under way. Returns whether it was the last one; else the next one begins."""
        # Freed at the end, when the model's stream has waited: the gradients that were sent, and buffers.
        finished, self._stage = self._stage, None
        with self._path.stream.beside_model():
            if finished is not None:
                sums = finished.finish()
                if self._stages:
                    self._start_stage(sums)
                elif self._path.replicas is None:
                    self._totals = sums
                else:
                    replicas = ReplicaExchange(self._path.replicas, self._part_shapes)
                    self._sum = replicas, replicas.start_sum(sums, self._wire_dtype)
                    self._path.bytes_sent["reduce"] += self._sum[1].bytes_sent
            elif self._sum is not None:
                replicas, exchange = self._sum
                self._totals = replicas.finish_sum(exchange.wait())
        self._path.stream.join()
        return self._totals is not None

    def means(self, num_ranks: int, device: torch.device) -> dict[str, Tensor]:
        """Each expert's gradient, after the last leg: the mean over all ranks with tokens of their own, as in DDP.

        Args:
            num_ranks: how many those are.
            device: of the sharded parameters.

        Returns:
            Name -> [E, r, ...], of those that are not discarded; to be used after the stream's `join`.
        """
        assert self._totals is not None
        kept = {name: total for name, total in self._totals.items() if name not in self.discarded}
        stream = self._path.stream
        with stream.beside_model():
            return {name: stream.to(total.div_(num_ranks), device) for name, total in kept.items()}
