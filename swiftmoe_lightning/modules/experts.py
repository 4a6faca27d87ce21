"""The experts of one MoE layer, with the parameter names and call signature of Hugging Face transformers v5.

T tokens, D model dim, F hidden dim, E experts, K top-k, W ranks, R rows that this rank computes, s slots of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from swiftmoe_lightning.config import check_choice, check_whole
from swiftmoe_lightning.distributed import first_row, gather_shares, local_shard, phase, take_share
from swiftmoe_lightning.modules.adapters import Adapters
from swiftmoe_lightning.modules.context import ExpertParallelContext, SingleDeviceContext
from swiftmoe_lightning.modules.dispatch import TokenDispatcher
from swiftmoe_lightning.modules.expert_inputs import check_ids, check_input
from swiftmoe_lightning.modules.forward import ExpertsOutput, StartedForward
from swiftmoe_lightning.modules.initialize import fill_rows_uniform
from swiftmoe_lightning.modules.load import (
    NON_FINITE_SCORES,
    LoadCursor,
    TrainedLoad,
    in_backward,
    run_once_in_backward,
)
from swiftmoe_lightning.modules.sharded_forward import evaluates_sharded, finish_sharded
from swiftmoe_lightning.modules.two_level import TwoLevelDispatcher, make_dispatcher
from swiftmoe_lightning.modules.weights import check_loaded_shapes, compute_dtype, prepare_weights
from swiftmoe_lightning.ops import (
    ACTIVATIONS,
    Activation,
    SortedAssignments,
    all_finite,
    combine,
    expert_layer,
    expert_rows,
    permute,
    sort_assignments,
    unpermute,
)
from swiftmoe_lightning.placement import Capacity, ExpertLoad, plan_dispatch

if TYPE_CHECKING:
    from swiftmoe_lightning.modules.routing_tap import RoutingTap


class Experts(nn.Module):
    """E feed-forward experts. A token's assignments are computed on ranks with a replica, and summed by router weight.

    Parameters: `gate_up_proj [E, 2F, D]` (swiglu) or `up_proj [E, F, D]`, `down_proj [E, D, F]`; factors of their LoRA
    adapters, if any (see `convert`). On one device a plain MoE. Under an engine the same names are sharded by rows over
    the ranks, and forward computes with this rank's slots.

    Args:
        num_experts: E.
        dim: D.
        hidden_dim: F.
        activation: "swiglu", "gelu" or "relu2" (squared ReLU).
        bias: parameters `..._bias [E, 2F or F]` and `down_proj_bias [E, D]`, too.
        capacity: None computes every assignment.
        device: of the parameters; on "meta" they have no values yet.
        dtype: of the parameters.

    Raises:
        ValueError: for a size below 1, an unknown activation, or a capacity that is no `Capacity`.
    """

    def __init__(  # noqa: PLR0913 - public options
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        capacity: Capacity | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_whole(num_experts=num_experts, dim=dim, hidden_dim=hidden_dim)
        check_choice("activation", activation, ACTIVATIONS)
        self.num_experts, self.dim, self.hidden_dim = num_experts, dim, hidden_dim
        if capacity is not None and not isinstance(capacity, Capacity):
            raise ValueError(f"capacity must be a Capacity, or None, got {capacity!r}. Write Capacity(factor=1.0).")
        self.activation: Activation = activation
        self.capacity, self.transposed = capacity, False
        # The flag of the module that these stand for, if any, by which PEFT lays out adapters.
        self.is_transposed = False
        self.adapters = Adapters()
        up_name, up_rows = ("gate_up_proj", 2 * hidden_dim) if activation == "swiglu" else ("up_proj", hidden_dim)
        shapes: dict[str, tuple[int, ...]] = {up_name: (up_rows, dim), "down_proj": (dim, hidden_dim)}
        if bias:
            shapes |= {f"{up_name}_bias": (up_rows,), "down_proj_bias": (dim,)}
        for name, shape in shapes.items():
            empty = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.context: ExpertParallelContext = SingleDeviceContext(self.num_experts, self.expert_parameters)
        self.trained_load = TrainedLoad(self.context.placement)
        # Of record_routing and replay_routing, while one of them needs it.
        self.routing_tap: RoutingTap | None = None
        self.register_load_state_dict_pre_hook(check_loaded_shapes)
        if not self.is_meta:
            self.reset_parameters()

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, nn.Parameter], activation: Activation, transposed: bool = False
    ) -> Self:
        """Experts with these parameter objects as their own.

        Args:
            parameters: named as above.
            activation: also a function of rows, [R, 2F] (or [R, F] with `up_proj`) -> [R, F].
            transposed: weights are [E, in, out]: `gate_up_proj [E, D, 2F]`, `down_proj [E, F, D]`.
        """
        num_experts, dim, hidden_dim = parameters["down_proj"].shape
        if transposed:
            dim, hidden_dim = hidden_dim, dim
        known_activation = "swiglu" if "gate_up_proj" in parameters else "gelu"
        experts = cls(num_experts, dim, hidden_dim, activation=known_activation, device="meta")
        experts.activation, experts.transposed = activation, transposed
        # In the given order, in which an optimizer may have them.
        experts._parameters.clear()
        for name, parameter in parameters.items():
            experts.register_parameter(name, parameter)
        return experts

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no values yet."""
        return any(p.is_meta for p in self.parameters())

    def expert_parameters(self) -> Mapping[str, nn.Parameter]:
        """Name -> parameter [E, rows, ...]; on sharded parameters the global tensors."""
        return dict(self.named_parameters(recurse=False))

    def load_cursor(self) -> LoadCursor:
        """A cursor that reads the load these experts train on from now on."""
        return LoadCursor(lambda: self.trained_load)

    def reset_parameters(self) -> None:
        """Draw all weights from the default generator, uniform in +-1/sqrt(fan in), as `nn.Linear` does.

        Spread over ranks, each draws its own rows: with one seed on all ranks, they are those of one process.
        """
        seed = int(torch.randint(2**31, ()).item())
        for name, parameter in self.expert_parameters().items():
            self.initialize_rows(name, local_shard(parameter), first_row(parameter), seed)
        self.context.on_rewrite()

    def initialize_rows(self, name: str, rows: Tensor, first_row: int, seed: int) -> None:
        """Fill `rows` [E, r, ...], which are rows first_row.. of parameter `name`. Values do not depend on the cut."""
        if name.endswith("_lora_B"):
            nn.init.zeros_(rows)
            return
        fan_in = self.hidden_dim if name.startswith("down_proj") else self.dim
        seed += sorted(self.expert_parameters()).index(name)
        fill_rows_uniform(rows, first_row, seed, 1 / math.sqrt(fan_in))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], top_k_index [T, K] int, top_k_weights [T, K] -> [T, D].

        Raises:
            ValueError: for an input whose last dim is not D and, on the CPU or under torch's anomaly detection, for
                ids outside -1..E (-1 and E are unassigned).
            TypeError: for ids that are no integers.
            FloatingPointError: for non-finite router weights.
        """
        return self.run(hidden_states, top_k_index, top_k_weights).hidden_TD

    def run(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, scores_finite: Tensor | None = None
    ) -> ExpertsOutput:
        """One forward, phase by phase: count, plan, dispatch, experts, combine.

        Takes and raises what `forward` does. scores_finite: [] bool; None checks `weights_TK`.
        """
        return self.finish(self.start(x_TD, expert_ids_TK, weights_TK, scores_finite))

    def start(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, scores_finite: Tensor | None = None
    ) -> StartedForward:
        """The first part of `run`, which begins to count. What does not need the experts can run before `finish`.

        Takes and raises what `run` does.
        """
        check_input(x_TD, expert_ids_TK, self.num_experts, self.dim)
        if self.routing_tap is not None:
            self.routing_tap.check_routed(expert_ids_TK)
        num_tokens, out_dtype, tensor_ranks = len(x_TD), x_TD.dtype, self.context.tensor_ranks
        x_TD = x_TD.to(compute_dtype(x_TD))
        if scores_finite is None:
            scores_finite = all_finite(weights_TK)
        if tensor_ranks is not None:
            x_TD, expert_ids_TK, weights_TK = (take_share(t, tensor_ranks) for t in (x_TD, expert_ids_TK, weights_TK))
        by_expert = sort_assignments(expert_ids_TK, self.num_experts)
        gather = None
        if self.capacity is not None or not isinstance(self.context, SingleDeviceContext):
            gather = self._start_count(expert_ids_TK, by_expert.counts_G, scores_finite, x_TD.dtype)
        return StartedForward(x_TD, expert_ids_TK, weights_TK, scores_finite, by_expert, gather, num_tokens, out_dtype)

    # torch.compile traces no step of it that is for the host: numbers of rows, which change every step, and hooks.
    @torch.compiler.disable
    def _start_count(self, expert_ids_TK: Tensor, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype) -> Any:
        check_ids(expert_ids_TK, self.num_experts)
        with phase("count"):
            return self.context.start_count(counts_E, scores_finite, dtype, expert_ids_TK.shape)

    def finish(self, started: StartedForward) -> ExpertsOutput:
        """The second part of `run`.

        Args:
            started: what `start` returned.
        """
        x_TD = started.x_TD
        if started.gather is None:
            return self._finish_on_one_device(started)
        if evaluates_sharded(self):
            return finish_sharded(self, started)
        dispatcher, weights, load = self._plan(started.gather, started.by_expert, started.weights_TK, x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            with phase("dispatch"):
                arrived_RD, by_slot = dispatcher.dispatch(permute(x_TD, dispatcher.by_pair))
            with phase("experts"):
                weights = prepare_weights(weights, x_TD.dtype, self.transposed, self.adapters)
                y_RD = expert_rows(arrived_RD, by_slot, weights, self.activation)
            with phase("combine"):
                rows_MD = dispatcher.combine(unpermute(y_RD, by_slot))
                out_TD = combine(rows_MD, dispatcher.weights_TK, dispatcher.by_pair).to(started.out_dtype)
        if self.context.tensor_ranks is not None:
            out_TD = gather_shares(out_TD, started.num_tokens, self.context.tensor_ranks)
        return self._end(arrived_RD, out_TD, dispatcher.popularity_E, load)

    @torch.compiler.disable
    def _plan(
        self, gather: Callable[[], Any], by_expert: SortedAssignments, weights_TK: Tensor, x_TD: Tensor
    ) -> tuple[TokenDispatcher | TwoLevelDispatcher, Mapping[str, Tensor], ExpertLoad]:
        """Wait for all ranks' counts, and decide what this rank sends. Returns also the slots and what is computed."""
        context = self.context
        with phase("count"):
            counts_WE = context.begin_forward(gather)
        with phase("plan"):
            placement = context.placement
            plan = plan_dispatch(counts_WE, placement, context.split, self.capacity, context.ranks_per_node)
            load = ExpertLoad.of(counts_WE, plan, placement)
            dispatcher = make_dispatcher(context, plan, by_expert, weights_TK, load.popularity_E, x_TD)
        return dispatcher, context.weights(), load

    @torch.compiler.disable
    def _end(self, arrived_RD: Tensor, out_TD: Tensor, popularity_E: Tensor, load: ExpertLoad) -> ExpertsOutput:
        """Let backward collect the experts' gradients, and count what they were trained on."""
        context, placement = self.context, load.placement

        def on_backward() -> None:
            self.trained_load.add(load)

        context.end_forward(arrived_RD, out_TD, placement)
        out_TD = run_once_in_backward(out_TD, on_backward)
        num_data_ranks = placement.world_size / (1 if context.tensor_ranks is None else context.tensor_ranks.size)
        return ExpertsOutput(out_TD, popularity_E, num_data_ranks, in_backward())

    def _finish_on_one_device(self, started: StartedForward) -> ExpertsOutput:
        """`finish` on one device without a capacity. The CPU needs no counts, so nothing waits for a GPU."""
        x_TD, by_expert = started.x_TD, started.by_expert
        with torch.autocast(x_TD.device.type, enabled=False), phase("experts"):
            weights = prepare_weights(self.context.weights(), x_TD.dtype, self.transposed, self.adapters)
            out_TD = expert_layer(x_TD, started.weights_TK, by_expert, weights, self.activation)
        return self._end_on_one_device(out_TD.to(started.out_dtype), started)

    @torch.compiler.disable
    def _end_on_one_device(self, out_TD: Tensor, started: StartedForward) -> ExpertsOutput:
        check_ids(started.expert_ids_TK, self.num_experts)
        scores_finite, counts_E = started.scores_finite, started.by_expert.counts_G
        if scores_finite.device.type == "cpu" and not scores_finite:
            raise FloatingPointError(NON_FINITE_SCORES.format(where="an Experts layer"))

        def on_backward() -> None:
            self.trained_load.add_on_device(counts_E, scores_finite)

        return ExpertsOutput(run_once_in_backward(out_TD, on_backward), counts_E, 1, in_backward())

    def __getstate__(self) -> dict[str, Any]:
        # A copy (EMA, pickle) has the parameters only: groups, slots and engines belong to the original.
        return {k: v for k, v in self.__dict__.items() if k not in ("context", "trained_load", "routing_tap")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.context = SingleDeviceContext(self.num_experts, self.expert_parameters)
        self.trained_load = TrainedLoad(self.context.placement)
        self.routing_tap = None

    def extra_repr(self) -> str:
        """What `repr` shows in the parentheses."""
        name = getattr(self.activation, "__qualname__", self.activation)
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, {name}"
