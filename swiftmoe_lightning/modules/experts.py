"""The experts of one MoE layer, with the parameter names and call signature of Hugging Face transformers v5.

T tokens, D model dim, F hidden dim, E experts, K top-k, W ranks, R rows that this rank computes, s slots of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from swiftmoe_lightning.config import check_choice, check_whole
from swiftmoe_lightning.distributed import first_row, gather_shares, local_shard, take_share
from swiftmoe_lightning.modules.context import ExpertParallelContext, SingleDeviceContext
from swiftmoe_lightning.modules.dispatch import sort_by_pair
from swiftmoe_lightning.modules.initialize import fill_rows_uniform
from swiftmoe_lightning.modules.load import NON_FINITE_SCORES, LoadCursor, TrainedLoad, run_once_in_backward
from swiftmoe_lightning.modules.two_level import make_dispatcher
from swiftmoe_lightning.modules.weights import compute_dtype, prepare_weights
from swiftmoe_lightning.ops import ACTIVATIONS, Activation, expert_layer, expert_rows, sort_assignments
from swiftmoe_lightning.placement import Capacity, ExpertLoad, plan_dispatch


@dataclass(frozen=True, eq=False)
class ExpertsOutput:
    """What one forward of `Experts` returns.

    Attributes:
        hidden_TD: [T, D], the experts' weighted sum for each token.
        popularity_E: [E] int, assignments of all ranks of the group in this forward; on the CPU or the layer's device.
        num_data_ranks: ranks with tokens of their own that took part.
        recomputes: whether the forward ran inside backward (activation checkpointing).
    """

    hidden_TD: Tensor
    popularity_E: Tensor
    num_data_ranks: float
    recomputes: bool


class Experts(nn.Module):
    """E feed-forward experts. A token's assignments are computed on ranks with a replica, and summed by router weight.

    Parameters: `gate_up_proj [E, 2F, D]` (swiglu) or `up_proj [E, F, D]`, `down_proj [E, D, F]`. On one device a plain
    MoE. Under an engine the same names are sharded by rows over the ranks, and forward computes with this rank's slots.

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
        up_name, up_rows = ("gate_up_proj", 2 * hidden_dim) if activation == "swiglu" else ("up_proj", hidden_dim)
        shapes: dict[str, tuple[int, ...]] = {up_name: (up_rows, dim), "down_proj": (dim, hidden_dim)}
        if bias:
            shapes |= {f"{up_name}_bias": (up_rows,), "down_proj_bias": (dim,)}
        for name, shape in shapes.items():
            empty = torch.empty(num_experts, *shape, device=device, dtype=dtype)
            self.register_parameter(name, nn.Parameter(empty))
        self.context: ExpertParallelContext = SingleDeviceContext(self.num_experts, self.expert_parameters)
        self.trained_load = TrainedLoad(self.context.placement)
        self.register_load_state_dict_pre_hook(_check_loaded_shapes)
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
        fan_in = self.hidden_dim if name.startswith("down_proj") else self.dim
        offset = sorted(self.expert_parameters()).index(name)
        fill_rows_uniform(rows, first_row, seed + offset, 1 / math.sqrt(fan_in))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], top_k_index [T, K] int, top_k_weights [T, K] -> [T, D].

        Raises:
            ValueError: for an input whose last dim is not D and, on the CPU or under torch's anomaly detection, for
                ids outside -1..E (-1 and E are unassigned).
            TypeError: for ids that are no integers.
            FloatingPointError: for non-finite router weights.
        """
        return self.run(hidden_states, top_k_index, top_k_weights).hidden_TD

    # Splits are Python integers that change every step: traced, they would make torch.compile recompile each time.
    @torch.compiler.disable
    def run(
        self, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, scores_finite: Tensor | None = None
    ) -> ExpertsOutput:
        """One forward, phase by phase: count, plan, dispatch, experts, combine.

        Takes and raises what `forward` does. scores_finite: [] bool; None checks `weights_TK`.
        """
        self._check_input(x_TD, expert_ids_TK)
        context, out_dtype = self.context, x_TD.dtype
        x_TD = x_TD.to(compute_dtype(x_TD))
        if scores_finite is None:
            scores_finite = weights_TK.isfinite().all()
        if isinstance(context, SingleDeviceContext) and self.capacity is None:
            return self._run_on_one_device(x_TD, expert_ids_TK, weights_TK, scores_finite, out_dtype)
        num_tokens, tensor_ranks = len(x_TD), context.tensor_ranks
        if tensor_ranks is not None:
            x_TD, expert_ids_TK, weights_TK = (take_share(t, tensor_ranks) for t in (x_TD, expert_ids_TK, weights_TK))
        by_expert = sort_assignments(expert_ids_TK, self.num_experts)
        counts_WE = context.begin_forward(by_expert.counts_G, scores_finite, x_TD.dtype)
        placement = context.placement
        plan = plan_dispatch(counts_WE, placement, context.split, self.capacity, context.ranks_per_node)
        rank_plan = plan.for_rank(context.rank)
        by_pair = sort_by_pair(by_expert, weights_TK, plan, rank_plan)
        dispatcher = make_dispatcher(context, plan, rank_plan, by_pair, weights_TK, x_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            arrived_RD, by_slot = dispatcher.dispatch(x_TD)
            y_RD = expert_rows(arrived_RD, by_slot, self._weights(x_TD.dtype), self.activation)
            out_TD = dispatcher.combine(y_RD).to(out_dtype)
        if tensor_ranks is not None:
            out_TD = gather_shares(out_TD, num_tokens, tensor_ranks)
        load = ExpertLoad.of(counts_WE, plan, placement)

        def on_backward() -> None:
            self.trained_load.add(load)

        if out_TD.requires_grad:
            # At every backward: one forward may have several (retain_graph=True), which train each time.
            out_TD.register_hook(lambda _: context.on_backward(placement))
        popularity_E = torch.from_numpy(load.popularity_E)
        out_TD = run_once_in_backward(out_TD, on_backward)
        num_data_ranks = placement.world_size / (1 if tensor_ranks is None else tensor_ranks.size)
        return ExpertsOutput(out_TD, popularity_E, num_data_ranks, _in_backward())

    def _run_on_one_device(
        self,
        x_TD: Tensor,
        expert_ids_TK: Tensor,
        weights_TK: Tensor,
        scores_finite: Tensor,
        out_dtype: torch.dtype,
    ) -> ExpertsOutput:
        """`run` on one device without a capacity. The CPU needs no counts, so nothing waits for a GPU."""
        if scores_finite.device.type == "cpu" and not scores_finite:
            raise FloatingPointError(NON_FINITE_SCORES.format(where="an Experts layer"))
        by_expert = sort_assignments(expert_ids_TK, self.num_experts)
        with torch.autocast(x_TD.device.type, enabled=False):
            weights = self._weights(x_TD.dtype)
            out_TD = expert_layer(x_TD, weights_TK, by_expert, weights, self.activation).to(out_dtype)

        def on_backward() -> None:
            self.trained_load.add_on_device(by_expert.counts_G, scores_finite)

        return ExpertsOutput(run_once_in_backward(out_TD, on_backward), by_expert.counts_G, 1, _in_backward())

    def _weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The context's weights as the operations take them: [s, out, in], in the dtype of the rows."""
        return prepare_weights(self.context.weights(), dtype, self.transposed)

    def _check_input(self, x_TD: Tensor, expert_ids_TK: Tensor) -> None:
        if expert_ids_TK.is_floating_point() or expert_ids_TK.dtype == torch.bool:
            raise TypeError(
                f"Experts take expert ids as integers of 0..{self.num_experts - 1} (-1 and {self.num_experts} are "
                f"unassigned), got {expert_ids_TK.dtype}. Pass the indices of topk, not its values or a mask."
            )
        if _may_wait_for(expert_ids_TK.device) and expert_ids_TK.numel():
            least, most = (int(end) for end in expert_ids_TK.aminmax())
            if least < -1 or most > self.num_experts:
                raise ValueError(
                    f"expert ids must be 0..{self.num_experts - 1} (-1 and {self.num_experts} are unassigned), got "
                    f"{least}..{most}. Build the layer with the router's num_experts."
                )
        if x_TD.dim() != 2 or x_TD.shape[-1] != self.dim:
            raise ValueError(
                f"Experts take [tokens, dim={self.dim}], got {list(x_TD.shape)}. Flatten all but the last dim, "
                f"or build the layer with dim={x_TD.shape[-1]}."
            )

    def __getstate__(self) -> dict[str, Any]:
        # A copy (EMA, pickle) has the parameters only: groups, slots and engines belong to the original.
        return {k: v for k, v in self.__dict__.items() if k not in ("context", "trained_load")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.context = SingleDeviceContext(self.num_experts, self.expert_parameters)
        self.trained_load = TrainedLoad(self.context.placement)

    def extra_repr(self) -> str:
        """What `repr` shows in the parentheses."""
        name = getattr(self.activation, "__qualname__", self.activation)
        return f"{self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, {name}"


def _may_wait_for(device: torch.device) -> bool:
    """Whether to check values on `device`. Only a debugging run waits for a GPU to do so."""
    return device.type == "cpu" or torch.is_anomaly_enabled()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _check_loaded_shapes(experts: Experts, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    """Add to torch's message on a shape that differs which settings to look at."""
    for name, parameter in experts.expert_parameters().items():
        value = state.get(prefix + name)
        if isinstance(value, Tensor) and value.shape != parameter.shape:
            rest[-1].append(shape_message(prefix + name, value.shape, parameter.shape))


def shape_message(name: str, saved: torch.Size, expected: torch.Size) -> str:
    """The error message for a checkpoint in which `name` has another shape."""
    return (
        f"{name!r} has shape {list(saved)} in the checkpoint, and {list(expected)} in this model. Build the model "
        "with the checkpoint's num_experts, dim and hidden_dim, or load another checkpoint."
    )
