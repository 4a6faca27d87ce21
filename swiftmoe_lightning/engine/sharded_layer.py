"""One MoE layer whose experts are spread over the ranks: its sharded parameters, its slots, its part of a forward.

W ranks, E experts, s slots of a rank, D model dim (in x_TD).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from swiftmoe_lightning.distributed import (
    ExpertGroup,
    local_shard,
    shard_whole_values,
    sharded_like,
)
from swiftmoe_lightning.engine.gradient_placeholder import GradientPlaceholder, has_gradient
from swiftmoe_lightning.engine.handshake import ForwardHandshake, HandshakeTable
from swiftmoe_lightning.engine.slots import ExpertSlots, PendingCollection
from swiftmoe_lightning.modules import ExpertParallelContext, Experts
from swiftmoe_lightning.placement import Placement

if TYPE_CHECKING:
    from swiftmoe_lightning.engine.gradient_collector import GradientCollector


class ShardedLayer(ExpertParallelContext):
    """The context of an `Experts` module under an engine: its parameters are sharded, and forward uses slots.

    Args:
        index: of the layer among the module's layers.
        experts: the module, with sharded parameters.
        slots: its weights on this rank.
        group: this rank's expert group, and those that share its rows.
        split: the token split, as in `SwiftMoEConfig`.

    Attributes:
        stale: whether the slots may differ from the parameters (at first, after a load, after a write by the user). If
            it is True on any rank, the next forward fills the slots on all ranks.
    """

    def __init__(self, index: int, experts: Experts, slots: ExpertSlots, group: ExpertGroup, split: str) -> None:
        self.index, self.experts, self.slots, self._group = index, experts, slots, group
        self.rank, self.split, self.ranks_per_node = group.expert.rank, split, group.ranks_per_node
        self.tensor_ranks, self.nodes = group.tensor, group.nodes
        self.stale = True
        self._handshake: ForwardHandshake | None = None
        self._collector: GradientCollector | None = None
        self._placeholders: dict[str, GradientPlaceholder] = {}
        self._announced: HandshakeTable | None = None

    def connect(self, handshake: ForwardHandshake, collector: GradientCollector) -> None:
        """Connect the layer with the engine's handshake and gradient collector."""
        self._handshake, self._collector = handshake, collector

    @property
    def collector(self) -> GradientCollector:
        """The engine's, once connected."""
        assert self._collector is not None
        return self._collector

    @property
    def handshake(self) -> ForwardHandshake:
        """The engine's, once connected."""
        assert self._handshake is not None
        return self._handshake

    def accept_full_state_dicts(self) -> None:
        """Let the module's `load_state_dict` take whole experts, without communication."""
        self.experts.register_load_state_dict_pre_hook(self._shard_loaded)

    def _shard_loaded(self, experts: Experts, state: dict[str, Any], prefix: str, *_: Any) -> None:
        shard_whole_values(experts.expert_parameters(), state, prefix)
        self.stale = True

    def __deepcopy__(self, _: Any) -> ShardedLayer:
        # The load hook refers to this layer, and is copied with the module (EMA): a copy loads as the original does.
        return self

    @property
    def placement(self) -> Placement:  # type: ignore[override]
        """The placement of the slots, or of the weights that are being sent to them."""
        return self.slots.placement

    @property
    def token_bytes(self) -> Mapping[str, int]:
        """See `ExpertGroup.token_bytes`."""
        return self._group.token_bytes

    def _refuse_outdated(self) -> None:
        if not self.stale and self.slots.is_outdated:
            raise RuntimeError(
                "the experts' weights were written since they were last sent to their slots, and not by an optimizer "
                "that this engine prepared. Pass every optimizer through engine.prepare_optimizer (a strategy or "
                "prepare() does it, until its run ends: train on under 'swiftmoe'); after a write by hand call "
                "engine.mark_stale()."
            )

    def start_count(self, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype) -> Callable[[], HandshakeTable]:
        """Begin to gather all ranks' counts. A collective.

        Args:
            counts_E: [E] int32, this rank's assignments to each expert.
            scores_finite: [] bool, whether the router's scores are.
            dtype: of the rows that this forward will exchange.

        Raises:
            RuntimeError: when weights were written since they were last sent.
        """
        self._refuse_outdated()
        self.collector.on_forward()
        announced, self._announced = self._announced, None
        if announced is not None:
            return lambda: announced
        return self.handshake.start(self.index, counts_E, scores_finite, dtype, self.stale)

    def begin_forward(self, gather: Callable[[], HandshakeTable]) -> np.ndarray:
        """Wait for all ranks' counts, and fill the slots if they are stale. A collective.

        Args:
            gather: what `start_count` returned.

        Returns:
            [W, E] int64, the counts of all ranks.

        Raises:
            RuntimeError: as `ForwardHandshake.start` says.
            FloatingPointError: on every rank, if any rank's scores are not finite.
        """
        table = gather()
        if table.any_stale:
            self.slots.start_distribution(self.placement)
            self.stale = False
        self.slots.finish_distribution()
        return table.counts_WE(self.experts.num_experts)

    def weights(self) -> Mapping[str, Tensor]:
        """The slots by name, each [s, ...], which require gradients where the sharded parameters do."""
        # Freezing, toggling and fine-tuning schedules flip requires_grad on the sharded parameters alone.
        for name, sharded in self.experts.expert_parameters().items():
            self.slots.weights[name].requires_grad_(sharded.requires_grad)
        return self.slots.weights

    def exchange_rows(self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int]) -> Tensor:
        """Send rows to their ranks; differentiable. See `RankGroup.exchange_rows`."""
        return self._group.expert.exchange_rows(rows_RD, send_splits, receive_splits)

    def start_exchange(self, send: Tensor, send_splits: list[int], receive_splits: list[int]) -> Callable[[], Tensor]:
        """Begin to send numbers to their ranks. See `RankGroup.start_all_to_all`."""
        return self._group.expert.start_all_to_all(send, send_splits, receive_splits).wait

    def on_rewrite(self) -> None:
        """The module has overwritten its parameters: the slots are stale."""
        self.stale = True

    def distribute(self, placement: Placement) -> None:
        """Begin to send parameters' rows to the ranks of `placement`. Frozen experts that do not move are not sent."""
        is_unchanged = np.array_equal(placement.slot_to_expert_S, self.placement.slot_to_expert_S)
        # A parameter that was frozen between backward and step still has a gradient, and was updated.
        if is_unchanged and not any(p.requires_grad or has_gradient(p) for p in self.experts.parameters()):
            return
        self.slots.start_distribution(placement)
        self.stale = False

    def fill_if_stale(self) -> None:
        """Fill stale slots outside of a forward. A collective of all groups."""
        if self.stale:
            self.slots.start_distribution(self.placement)
            self.slots.finish_distribution()
            self.stale = False

    def on_backward(self, placement: Placement) -> None:
        """Backward has reached the layer: its gradients will be collected at the end.

        Args:
            placement: of its forward.

        Raises:
            RuntimeError: when the slots' weights have been replaced since that forward.
        """
        if any(p.requires_grad for p in self.experts.parameters()) and not self.slots.holds(placement):
            raise RuntimeError(
                "backward through a forward from before the last optimizer step (or load): its experts' weights have "
                "been replaced since, as an in-place update would. Run forward again after each step."
            )
        self.collector.on_backward(self)

    def place_placeholders(self) -> None:
        """Put placeholders in `.grad` of the sharded parameters before backward adds to the slots."""
        self.discard_gradients()
        for name, sharded in self.experts.expert_parameters().items():
            if sharded.requires_grad and name not in self._placeholders:
                self._placeholders[name] = GradientPlaceholder(sharded)

    def discard_gradients(self) -> None:
        """Remove the gradients from the slots that the user has discarded (`zero_grad`, `p.grad = None`)."""
        parameters = self.experts.expert_parameters()
        for name, placeholder in list(self._placeholders.items()):
            if placeholder.was_discarded(parameters[name]):
                self._placeholders.pop(name).release()
                self.slots.weights[name].grad = None

    def holds_gradients(self) -> bool:
        """Whether gradients wait in the slots, which were neither collected nor discarded by the user."""
        self.discard_gradients()
        return self.slots.has_gradients

    @torch.no_grad()
    def serve(self, table: HandshakeTable) -> None:
        """Take part in the evaluation forward that other ranks have announced in `table`, without tokens."""
        self._announced = table
        device = next(iter(self.experts.parameters())).device
        x_TD = torch.empty(0, self.experts.dim, dtype=table.dtype, device=device)
        no_assignments = torch.empty(0, 1, device=device)
        self.experts.run(x_TD, no_assignments.long(), no_assignments, torch.ones((), dtype=torch.bool, device=device))

    @torch.no_grad()
    def add_to_sharded_gradients(self, collection: PendingCollection) -> None:
        """Wait for the collected rows, and add them to `.grad` of the parameters; the user's hooks on them run."""
        parameters = self.experts.expert_parameters()
        shards = {name: local_shard(parameters[name]) for name in collection.names}
        shapes = {name: shard.shape for name, shard in shards.items()}
        for name, total in collection.wait(shapes, self._group.num_data_ranks).items():
            self._placeholders.pop(name, None)
            # Contiguous: fused optimizer kernels ignore strides.
            accumulate_gradient(parameters[name], total.to(shards[name]))


def collect_gradients(layers: list[ShardedLayer]) -> None:
    """The gradients in these layers' slots -> `.grad` of their sharded parameters. A collective."""
    under_way: deque[tuple[ShardedLayer, PendingCollection]] = deque()
    # The gradients of a layer travel while the rows of the one before are added up or, with several groups, its sums
    # travel between groups.
    for layer in sorted(layers, key=lambda layer: layer.index):
        started = layer.slots.start_collection()
        if under_way:
            under_way[-1][1].start_sum_over_groups()
        while under_way and (len(under_way) > 1 or not under_way[0][1].is_between_groups):
            finished, collection = under_way.popleft()
            finished.add_to_sharded_gradients(collection)
        if started is not None:
            under_way.append((layer, started))
    if under_way:
        under_way[-1][1].start_sum_over_groups()
    for layer, collection in under_way:
        layer.add_to_sharded_gradients(collection)


def accumulate_gradient(sharded: nn.Parameter, shard: Tensor) -> None:
    """Add this rank's rows of a gradient to `.grad`, as autograd does for a leaf.

    First tensor hooks, which may replace the gradient, then the addition, then post-accumulate hooks.
    """
    gradient: Tensor = sharded_like(shard, sharded)
    for hook in (sharded._backward_hooks or {}).values():
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    if has_gradient(sharded):
        assert sharded.grad is not None
        local_shard(sharded.grad).add_(local_shard(gradient))
    else:
        sharded.grad = gradient
    for hook in (getattr(sharded, "_post_accumulate_grad_hooks", None) or {}).values():
        hook(sharded)
