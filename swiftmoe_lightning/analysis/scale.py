"""What a step costs in bytes, seconds and memory when W = R g ranks train in R groups of g, on paper.

Every group of g ranks holds all E experts and places them by its own counts. The rows of an expert are cut over the g
ranks of a group, and each part over the R groups, so that a rank owns 1 / W of every expert's optimizer state.

W ranks, g of a group, R groups, E experts, s slots of a rank, d (rank, expert) pairs of a rank, G bytes of one expert,
K top-k, T tokens of a rank and micro-batch, D model dim, L MoE layers. d is taken for s, the most that it can be.

`cost.Machine` has one group, one speed and no latency, for it compares policies on a trace. Here groups span nodes, and
small messages count, so there are two kinds of links, with latencies; bytes of a phase are `cost.phase_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final

from swiftmoe_lightning.analysis.cluster import BYTES_OF, Cluster, Workload
from swiftmoe_lightning.analysis.cost import Machine, phase_bytes
from swiftmoe_lightning.analysis.model_sizes import ModelSizes
from swiftmoe_lightning.config import SwiftMoEConfig, check_whole
from swiftmoe_lightning.placement import shard_rows

# Share of a GPU's memory for activations, temporary copies and the allocator, which are not counted.
SPARE: Final = 0.2
# Layers whose gradients, or weights, are on their way at the same time.
_LAYERS_IN_FLIGHT: Final = 2
# A parameter, its gradient, and Adam's two moments.
_COPIES: Final = 4
# Tokens travel to the experts and back, forward and backward.
_TOKEN_EXCHANGES: Final = 4
# Integers that a rank sends before each layer besides its E counts.
_HEADER: Final = 11


@dataclass(frozen=True)
class GroupCost:
    """One group size, and what it costs a rank. Seconds are of phase after phase, without overlap or computation.

    Attributes:
        model: the sizes.
        cluster: the ranks.
        workload: their work.
        group_size: g, a divisor of W.

    Raises:
        ValueError: where g does not divide W.
    """

    model: ModelSizes
    cluster: Cluster
    workload: Workload
    group_size: int

    def __post_init__(self) -> None:
        check_whole(group_size=self.group_size)
        if self.cluster.num_ranks % self.group_size:
            raise ValueError(f"group_size must divide the {self.cluster.num_ranks} ranks, got {self.group_size}.")

    @property
    def num_groups(self) -> int:
        """R."""
        return self.cluster.num_ranks // self.group_size

    @cached_property
    def slots_per_rank(self) -> int:
        """The slots s that a run takes by default."""
        return SwiftMoEConfig().resolve_slots_per_rank(self.model.num_experts, self.group_size)

    @property
    def group_bytes(self) -> float:
        """Bytes of a rank and step within the group: collect and distribute, L s G (g - 1) / g each.

        Weights are sent `fills` times.
        """
        g, slots = self.group_size, self.slots_per_rank
        machines = [Machine(num_ranks=g, slots_per_rank=slots, expert_bytes=size) for size in self._phases]
        weights, gradients = (phase_bytes(g * slots, machine) / g for machine in machines)
        return self.model.num_layers * (self.fills * weights + gradients)

    @property
    def fills(self) -> float:
        """How often a layer's slots are filled in a step: once, or before each forward and all but one backward."""
        if not self.workload.reshard_after_forward:
            return 1.0
        return self.workload.micro_batches * (2 - 1 / self.model.num_layers)

    @property
    def across_bytes(self) -> float:
        """Bytes of a rank and step across groups: the sum and the gather, L (E G / g) (R - 1) / R each.

        It is all that static expert parallelism with a distributed optimizer sends.
        """
        owned = self.model.num_experts / self.cluster.num_ranks
        weights, gradients = self._phases
        return self.model.num_layers * (self.fills * weights + gradients) * owned * (self.num_groups - 1)

    @property
    def messages(self) -> int:
        """Messages of a rank and step with weights and gradients, 2 L (g - 1 + R - 1) where slots are filled once."""
        exchanges = round((1 + self.fills) * self.model.num_layers)
        return exchanges * (self.group_size - 1 + self.num_groups - 1)

    @property
    def fullest(self) -> float:
        """Rows of the rank that owns most, over the mean: above 1 where W does not divide the rows."""
        return self._fullest(self.num_groups)

    @property
    def weight_seconds(self) -> float:
        """Of a step: collect, sum, gather, distribute."""
        g, num_experts = self.group_size, self.model.num_experts
        seconds = 0.0
        for expert_bytes, times in zip(self._phases, (self.fills, 1), strict=True):
            seconds += times * self._exchange_in_group(self.slots_per_rank * expert_bytes / g * self._fullest(1))
            owned = num_experts * expert_bytes / self.cluster.num_ranks * self.fullest
            seconds += times * self.cluster.between_groups_seconds(g, owned)
        return self.model.num_layers * seconds

    @property
    def token_seconds(self) -> float:
        """Of a micro-batch: dispatch and combine, forward and backward."""
        exchanges = _TOKEN_EXCHANGES * self.model.num_layers
        return exchanges * self._exchange_in_group(self.token_bytes / self.group_size)

    @property
    def count_seconds(self) -> float:
        """Of a micro-batch: every rank's counts to every rank of its group, 4 bytes each."""
        return self.model.num_layers * self._exchange_in_group(4 * (self.model.num_experts + _HEADER))

    @property
    def step_seconds(self) -> float:
        """All exchanges of a step."""
        return self.weight_seconds + self.workload.micro_batches * (self.token_seconds + self.count_seconds)

    @property
    def has_slots(self) -> bool:
        """Whether weights are apart from parameters; one rank computes with these, unless they are elsewhere."""
        is_alone = self.cluster.num_ranks == 1
        return not is_alone or self.workload.offload_optimizer or self.workload.reshard_after_forward

    @property
    def slot_bytes(self) -> float:
        """Memory of the slots: all layers', or of the one that runs and those whose weights are on their way."""
        layers = self.model.num_layers
        if self.workload.reshard_after_forward:
            layers = min(1 + _LAYERS_IN_FLIGHT, layers)
        return layers * self.slots_per_rank * self._phases[0] if self.has_slots else 0.0

    @property
    def state_bytes(self) -> float:
        """Memory of the fullest rank's parameters of experts, their gradients and optimizer state, on its GPU."""
        return 0.0 if self.workload.offload_optimizer else self._owned_bytes

    @property
    def host_bytes(self) -> float:
        """The same where they are in the CPU's memory, for each rank."""
        return self._owned_bytes if self.workload.offload_optimizer else 0.0

    @property
    def _owned_bytes(self) -> float:
        parameters = self.model.num_layers * self.model.num_experts * self.model.expert_parameters
        mean = parameters / self.cluster.num_ranks
        return _COPIES * BYTES_OF[self.workload.state_dtype] * mean * self.fullest

    @property
    def buffer_bytes(self) -> float:
        """Memory of gradients on their way, and of one layer's tokens, sent and received.

        Slots' gradients leave layer by layer inside backward. Over several micro-batches all layers' wait in the slots.
        From the CPU's memory rows of parameters come to the GPU before they are sent.
        """
        if not self.has_slots:
            return 0.0
        weights, gradients = self._phases
        in_flight = min(_LAYERS_IN_FLIGHT, self.model.num_layers)
        waiting = in_flight if self.workload.micro_batches == 1 else self.model.num_layers
        owned = self.model.num_experts / self.group_size if self.num_groups > 1 else 0.0
        wire = 2 * (self.slots_per_rank + owned) * gradients
        rows = self.model.num_experts / self.cluster.num_ranks * weights if self.workload.offload_optimizer else 0.0
        tokens = self._num_rows * self.model.dim * BYTES_OF[self.workload.param_dtype] if self.group_size > 1 else 0
        return waiting * self.slots_per_rank * weights + in_flight * (wire + rows) + 2 * tokens

    def dense_bytes(self, dense: str) -> float:
        """Memory of the other parameters, their gradients and optimizer state.

        Args:
            dense: "ddp" (whole on each rank), "hsdp" (cut over a group) or "fsdp2" (cut over all ranks).
        """
        parts = {"ddp": 1, "hsdp": self.group_size, "fsdp2": self.cluster.num_ranks}[dense]
        return _COPIES * BYTES_OF[self.workload.state_dtype] * self.model.dense_parameters / parts

    @cached_property
    def dense(self) -> str:
        """The mode with the fewest bytes across nodes that fits: "ddp", then "hsdp", then "fsdp2"."""
        if self.cluster.num_ranks == 1:
            return "ddp"
        modes = ["ddp"]
        if 1 < self.group_size < self.cluster.num_ranks:
            modes.append("hsdp")
        room = (1 - SPARE) * self.cluster.gpu_bytes - self.slot_bytes - self.state_bytes - self.buffer_bytes
        return next((mode for mode in modes if self.dense_bytes(mode) <= room), "fsdp2")

    @property
    def resident_bytes(self) -> float:
        """Memory of a rank's GPU: slots, parameters with their state, buffers, the dense part. No activations."""
        return self.slot_bytes + self.state_bytes + self.buffer_bytes + self.dense_bytes(self.dense)

    @property
    def fits(self) -> bool:
        """Whether a share of `SPARE` of the GPU's memory is left for what is not counted."""
        return self.resident_bytes <= (1 - SPARE) * self.cluster.gpu_bytes

    @property
    def _phases(self) -> tuple[int, int]:
        """G of the weights, and G of the gradients."""
        parameters = self.model.expert_parameters
        return parameters * BYTES_OF[self.workload.param_dtype], parameters * BYTES_OF[self.workload.reduce_dtype]

    @property
    def token_bytes(self) -> float:
        """What a rank sends in one exchange of one layer, the mean of four, its own part included: T K rows."""
        return self._num_rows * self.workload.row_bytes(self.model.dim)

    @property
    def _num_rows(self) -> int:
        return self.workload.tokens * self.model.top_k

    @property
    def ranks_per_node(self) -> int:
        """n: see `Cluster.group_ranks_per_node`."""
        return self.cluster.group_ranks_per_node(self.group_size)

    def _exchange_in_group(self, message: float) -> float:
        return self.cluster.in_group_seconds(self.group_size, message)

    def _fullest(self, num_groups: int) -> float:
        """Rows are cut over g first, then each part over the groups; the first rank is the fullest."""
        owned = 0
        for rows, elements in self.model.row_elements:
            _, part = shard_rows(rows, self.group_size)[0]
            owned += shard_rows(part, num_groups)[0][1] * elements
        return owned * self.group_size * num_groups / self.model.expert_parameters
