"""The ranks, their links and their work, for costs on paper. W ranks, T tokens of a rank and micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd
from typing import Final

from swiftmoe_lightning.config import DTYPES, TOKEN_DTYPES, check_choice, check_coefficient, check_whole

BYTES_OF: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# More than any run has.
_MOST_RANKS: Final = 2**17
_MOST: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The ranks and their links. The speeds are round numbers for NVLink in a node and 400 Gb/s a rank between nodes.

    Attributes:
        num_ranks: W.
        ranks_per_node: neighbours with fast links, a node or an NVLink domain.
        node_bytes: bytes a second that a rank sends to ranks of its node while it receives as many.
        node_latency: seconds of one message within a node.
        network_bytes: as `node_bytes`, to other nodes.
        network_latency: seconds of one message to another node.
        gpu_bytes: memory of a rank's GPU.

    Raises:
        ValueError: for a value out of range.
    """

    num_ranks: int
    ranks_per_node: int = 8
    node_bytes: float = 400e9
    node_latency: float = 1e-6
    network_bytes: float = 45e9
    network_latency: float = 2e-6
    gpu_bytes: float = 80e9

    def __post_init__(self) -> None:
        check_whole(num_ranks=self.num_ranks, ranks_per_node=self.ranks_per_node)
        if self.num_ranks > _MOST_RANKS:
            raise ValueError(f"num_ranks must be at most {_MOST_RANKS}, got {self.num_ranks}.")
        for name in ("node_bytes", "network_bytes", "gpu_bytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {getattr(self, name)!r}.")
        check_coefficient(node_latency=self.node_latency, network_latency=self.network_latency)

    def of_sizes(self, ranks: str) -> list[Cluster]:
        """The same links with other numbers of ranks.

        Args:
            ranks: whole numbers with commas between.

        Raises:
            ValueError: for anything else.
        """
        numbers = [number.strip() for number in ranks.split(",")]
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            raise ValueError(f"--ranks must be whole numbers with commas between, got {ranks!r}. Write 64, or 8,64.")
        return [replace(self, num_ranks=int(number)) for number in numbers]

    def group_ranks_per_node(self, group_size: int) -> int:
        """Ranks of a group on one node; of a rank with the fewest neighbours where groups lie across nodes' borders."""
        return gcd(group_size, self._node_size)

    @property
    def _node_size(self) -> int:
        return min(self.ranks_per_node, self.num_ranks)

    def in_group_seconds(self, group_size: int, message: float) -> float:
        """One exchange of every rank with its group, for a rank with the fewest neighbours in it.

        Args:
            group_size: g.
            message: bytes for each peer.
        """
        near = self.group_ranks_per_node(group_size) - 1
        return self.exchange_seconds(near, group_size - 1 - near, message)

    def between_groups_seconds(self, group_size: int, message: float) -> float:
        """One exchange of every rank with those of its place in the other groups.

        Args:
            group_size: g.
            message: bytes for each peer.
        """
        near = max(1, self._node_size // group_size) - 1
        return self.exchange_seconds(near, self.num_ranks // group_size - 1 - near, message)

    def exchange_seconds(self, near: int, far: int, message: float) -> float:
        """One exchange, in which a rank sends and receives a message of each peer; both kinds of links at once.

        Args:
            near: peers in the rank's node.
            far: peers in other nodes.
            message: bytes.
        """
        return max(
            near * (self.node_latency + message / self.node_bytes),
            far * (self.network_latency + message / self.network_bytes),
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a rank does in a step, and in which numbers.

    Attributes:
        tokens: T of a rank and micro-batch.
        micro_batches: of a step.
        param_dtype: of the slots, and of weights and tokens on the wire.
        reduce_dtype: of gradients on the wire.
        token_dtype: the narrower one of tokens on the wire, as in `SwiftMoEConfig`.
        state_dtype: of parameters, their gradients and Adam's moments where they are owned.
        offload_optimizer: experts' parameters, their gradients and moments are in the CPU's memory.
        reshard_after_forward: slots have weights only around their layer's forward and backward.

    Raises:
        ValueError: for a value out of range.
    """

    tokens: int = 4096
    micro_batches: int = 1
    param_dtype: str = "bfloat16"
    reduce_dtype: str = "bfloat16"
    token_dtype: str | None = None
    state_dtype: str = "float32"
    offload_optimizer: bool = False
    reshard_after_forward: bool = False

    def __post_init__(self) -> None:
        check_whole(tokens=self.tokens, micro_batches=self.micro_batches)
        for name in ("tokens", "micro_batches"):
            if getattr(self, name) > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}, got {getattr(self, name)}.")
        for name in ("param_dtype", "reduce_dtype", "state_dtype"):
            check_choice(name, getattr(self, name), DTYPES)
        if self.token_dtype is not None:
            check_choice("token_dtype", self.token_dtype, TOKEN_DTYPES)

    def row_bytes(self, dim: int) -> float:
        """Bytes of a token's row on the wire: to its expert, back, and both gradients; their mean.

        Args:
            dim: D.
        """
        as_is = dim * BYTES_OF[self.param_dtype]
        returned = as_is if self.token_dtype is None else min(as_is, 2 * dim)
        # fp8 is a byte a number, and 4 of a scale.
        sent = dim + 4 if self.token_dtype == "float8_e4m3fn" else returned
        return (sent + 3 * returned) / 4
