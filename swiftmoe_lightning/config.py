"""Settings of a run, checked against each other where they are made. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, Literal

PLACEMENTS: Final = ("balanced", "packed", "symi", "swap", "static")
DENSE_MODES: Final = ("ddp", "fsdp2", "hsdp")
MOST_NEIGHBOURS: Final = 64
EXCHANGES: Final = ("flat", "two_level", "auto")
EVALUATIONS: Final = ("placed", "sharded")
TOKEN_SPLITS: Final = ("balanced", "local_first", "uniform")
TOKEN_DTYPES: Final = ("bfloat16", "float8_e4m3fn")
DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
# Field of `SwiftMoEConfig` -> its values.
_CHOICES: Final = {
    "token_split": TOKEN_SPLITS,
    "exchange": EXCHANGES,
    "dense": DENSE_MODES,
    "evaluate": EVALUATIONS,
    "param_dtype": DTYPES,
    "reduce_dtype": DTYPES,
    "token_dtype": TOKEN_DTYPES,
}
_MAY_BE_NONE: Final = ("param_dtype", "token_dtype")


@dataclass(frozen=True, kw_only=True)
class SwiftMoEConfig:
    """How experts are replicated, placed and exchanged. Every field is JSON-able (a policy class excepted).

    Attributes:
        slots_per_rank: slots (places for one expert's weights) on each rank, s. None picks
            max(ceil(1.25 * E / W), ceil(E / W) + 1) for W > 1 ranks and E experts, at most E; and E for W = 1.
        placement: "balanced" (the fewest (rank, expert) pairs that carry the load and its movement, so the fewest
            bytes), "packed" (a replica in every slot, hot packed with cold), "symi" (the paper's Algorithm 1,
            contiguous), "swap" (HierMoE's: uniform replicas, pairs of which change places), "static" (uniform,
            contiguous), or a subclass of `PlacementPolicy`.
        replace_every: optimizer steps between two placements; 1 is every step. "auto" looks at every step, and leaves
            a layer as it is while its loads are even, unless a new placement has fewer (rank, expert) pairs.
        token_split: how an expert's tokens are split over its slots: "balanced" (so that the loads of all ranks are as
            even as the placement allows; equal shares where every slot has a budget of its own), "local_first" (equal
            shares), or "uniform" (equal shares). With the first two a rank's own tokens stay on it, or else on its
            node, as far as the shares allow.
        exchange: how tokens travel between the ranks of an expert group that spans nodes of several ranks: "flat" (an
            assignment at a time, straight to its rank), "two_level" (a token once to each node that has one of its
            experts, and on from there; flat in forwards where that would send more bytes between nodes), or "auto"
            (measures both kinds of links at the start, and takes in each forward what they make faster).
        dense: how the other parameters train: "ddp" (whole on each rank, gradients averaged by
            DistributedDataParallel), or "fsdp2" (parameters, gradients and optimizer state cut over the ranks by
            `fully_shard`, weights gathered block by block for use; all of them for evaluation), or "hsdp" (the same
            over each expert group, which all have copies).
        expert_parallel_size: ranks of an expert group, g. Each group holds all experts, and places them by its own
            tokens; tokens never leave their group. It must divide the number of ranks. None takes all ranks up to 64,
            else the largest divisor of their number up to 64.
        param_dtype: dtype of the experts' working weights and of their exchange; None means the sharded parameters'
            own.
        reduce_dtype: dtype of the experts' gradients on the wire (with dense="fsdp2" of all); their sum is taken in
            float32 or wider.
        token_dtype: narrower numbers for tokens on the wire. None sends them in the dtype in which experts compute;
            "bfloat16" in bfloat16 (float16 stays); "float8_e4m3fn" to their experts in fp8 with one scale a token, and
            results back in bfloat16. With either, tokens' gradients travel in bfloat16.
        offload_optimizer: keep the experts' sharded parameters and optimizer state in the CPU's memory, and update them
            there (pass fused=True to the optimizer: torch has fused updates for the CPU). Gradients come down and
            weights go up layer by layer. Needs a process group that also serves the CPU ("cpu:gloo,cuda:nccl"), also
            on one rank.
        reshard_after_forward: free a layer's slots after its forward, and fill them again for its backward (FSDP2's
            word), so that a rank has the weights of a few layers at a time instead of all; they are sent twice a step.
            Needs a process group, also on one rank.
        evaluate: how experts compute in evaluation (in eval mode, without gradients): "placed" (each where its
            replicas are, as in training), or "sharded" (every rank holds a part of every expert's hidden dim, and
            computes that part for the tokens of all ranks of its group: equal loads whatever the routing, without a
            capacity). Slots are cut so at the first evaluation step, and made whole again where training goes on.

    Raises:
        ValueError: for a value that a field cannot have, or fields that do not go together.
    """

    slots_per_rank: int | None = None
    placement: Any = "balanced"
    replace_every: int | Literal["auto"] = 1
    token_split: str = "balanced"
    exchange: str = "flat"
    dense: str = "ddp"
    expert_parallel_size: int | None = None
    param_dtype: str | None = None
    reduce_dtype: str = "float32"
    token_dtype: str | None = None
    offload_optimizer: bool = False
    reshard_after_forward: bool = False
    evaluate: str = "placed"

    def __post_init__(self) -> None:
        if self.replace_every != "auto":
            check_whole(replace_every=self.replace_every)
        if self.slots_per_rank is not None:
            check_whole(slots_per_rank=self.slots_per_rank)
        if self.expert_parallel_size is not None:
            check_whole(expert_parallel_size=self.expert_parallel_size)
        if isinstance(self.placement, str):
            check_choice("placement", self.placement, PLACEMENTS)
        elif not isinstance(self.placement, type):
            raise ValueError(
                f"placement must be one of {', '.join(map(repr, PLACEMENTS))} or a subclass of PlacementPolicy, got "
                f"{self.placement!r}. Leave it out for 'balanced'."
            )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value is not None or name not in _MAY_BE_NONE:
                check_choice(name, value, choices)
        self._check_memory_options()

    def _check_memory_options(self) -> None:
        for name in ("offload_optimizer", "reshard_after_forward"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be True or False, got {value!r}. Leave it out for False.")
        if self.reshard_after_forward and self.evaluate == "sharded":
            raise ValueError(
                "evaluate='sharded' cuts slots that stay in memory, and reshard_after_forward=True frees them after "
                "each forward. Leave one of them out. (FAQ: sharded-evaluation)"
            )

    @property
    def spreads_one_rank(self) -> bool:
        """Whether parameters and slots are apart on one rank, too, instead of a plain MoE."""
        return self.offload_optimizer or self.reshard_after_forward

    def resolve_expert_parallel_size(self, num_ranks: int) -> int:
        """Ranks of an expert group, g, of `num_ranks`.

        Raises:
            ValueError: when it does not divide them.
        """
        if self.expert_parallel_size is None:
            return max(size for size in range(1, min(num_ranks, MOST_NEIGHBOURS) + 1) if num_ranks % size == 0)
        if num_ranks % self.expert_parallel_size:
            sizes = ", ".join(str(size) for size in range(1, num_ranks + 1) if num_ranks % size == 0)
            raise ValueError(
                f"expert_parallel_size={self.expert_parallel_size} does not divide the {num_ranks} ranks into groups "
                f"of equal size. Set it to one of {sizes}, or leave it None. (FAQ: group-size)"
            )
        return self.expert_parallel_size

    def resolve_slots_per_rank(self, num_experts: int, world_size: int) -> int:
        """Slots of each rank for a layer of E experts on the W ranks of an expert group.

        Args:
            num_experts: E.
            world_size: W.

        Raises:
            ValueError: when the W * s slots cannot hold every expert once.
        """
        if self.slots_per_rank is None:
            if world_size == 1:
                return num_experts
            per_rank = -(-num_experts // world_size)
            return min(num_experts, max(-(-5 * num_experts // (4 * world_size)), per_rank + 1))
        if world_size * self.slots_per_rank < num_experts:
            raise ValueError(
                f"{world_size} ranks x {self.slots_per_rank} slots = {world_size * self.slots_per_rank} slots cannot "
                f"hold {num_experts} experts, and every expert keeps at least one replica. Set slots_per_rank to "
                f"{-(-num_experts // world_size)} or more, or leave it None. (FAQ: too-few-slots)"
            )
        return self.slots_per_rank


def check_config(config: object) -> SwiftMoEConfig:
    """The same config, or the default one for None.

    Raises:
        ValueError: for anything else.
    """
    if config is None:
        return SwiftMoEConfig()
    if not isinstance(config, SwiftMoEConfig):
        raise ValueError(
            f"config must be a SwiftMoEConfig, got {config!r}. Write SwiftMoEConfig(slots_per_rank=...), or leave it "
            "out."
        )
    return config


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Make sure that a setting has an allowed value.

    Args:
        name: the setting's, for the message.
        value: what it is set to.
        choices: the allowed values.

    Raises:
        ValueError: unless `value` is one of `choices`, naming the setting and the allowed values.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def check_whole(minimum: int = 1, **values: int) -> None:
    """Make sure that values are whole numbers.

    Args:
        minimum: the least they may be.
        **values: each by its name, for the message.

    Raises:
        ValueError: for a value that is not a whole number of `minimum` or more, by its name.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError(f"{name} must be a whole number of {minimum} or more, got {value!r}.")


def check_coefficient(**values: float) -> None:
    """Make sure that values are numbers of 0 or more.

    Args:
        **values: each by its name, for the message.

    Raises:
        ValueError: for a value that is not a number of 0 or more, by its name.
    """
    for name, value in values.items():
        if not is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a number of 0 or more, got {value!r}.")


def is_number(value: object) -> bool:
    """Whether it is a real number; True and False are none here."""
    return isinstance(value, Real) and not isinstance(value, bool)
