"""One MoE layer whose experts are spread over the ranks: its sharded parameters, its slots, its part of a forward.

W ranks, E experts, s slots of a rank, D model dim (in x_TD).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from swiftmoe_lightning.distributed import ExpertGroup, shard_whole_values
from swiftmoe_lightning.engine.gradient_placeholder import has_gradient
from swiftmoe_lightning.engine.handshake import ForwardHandshake
from swiftmoe_lightning.engine.handshake_rows import HandshakeTable, LayerCall
from swiftmoe_lightning.engine.layer_evaluation import LayerEvaluation
from swiftmoe_lightning.engine.layer_gradients import LayerGradients
from swiftmoe_lightning.engine.slots import ExpertSlots
from swiftmoe_lightning.modules import ExpertParallelContext, Experts, evaluates_sharded, finish_sharded
from swiftmoe_lightning.placement import Placement

if TYPE_CHECKING:
    from swiftmoe_lightning.engine.gradient_collector import GradientCollector
    from swiftmoe_lightning.engine.weight_window import WeightWindow


class ShardedLayer(ExpertParallelContext):
    """The context of an `Experts` module under an engine: its parameters are sharded, and forward uses slots.

    Args:
        index: of the layer among the module's layers.
        experts: the module, with sharded parameters.
        slots: its weights on this rank.
        group: this rank's expert group, and those that share its rows.
        split: the token split, as in `SwiftMoEConfig`.
        token_dtype: the narrower dtype of tokens on the wire, if any.

    Attributes:
        gradients: those of its slots and sharded parameters.
        stale: whether the slots may differ from the parameters (at first, after a load, after a write by the user). If
            it is True on any rank, the next forward fills the slots on all ranks.
    """

    def __init__(
        self,
        index: int,
        experts: Experts,
        slots: ExpertSlots,
        group: ExpertGroup,
        split: str,
        token_dtype: torch.dtype | None,
    ) -> None:
        self.index, self.experts, self.slots, self._group = index, experts, slots, group
        self.rank, self.split, self.ranks_per_node = group.expert.rank, split, group.ranks_per_node
        self.tensor_ranks, self.nodes = group.tensor, group.nodes
        # Alone in its group a rank sends nothing, and rounds nothing.
        self.token_dtype = token_dtype if group.expert.size > 1 else None
        self.evaluation = None if slots.pieces is None else LayerEvaluation(self, group.expert)
        self.stale = True
        self._handshake: ForwardHandshake | None = None
        self._collector: GradientCollector | None = None
        self._window: WeightWindow | None = None
        self.gradients = LayerGradients(experts, slots, group.num_data_ranks, self._on_gradients)
        self._announced: HandshakeTable | None = None
        self._leaves_by_rows = False

    def connect(self, handshake: ForwardHandshake, collector: GradientCollector, window: WeightWindow) -> None:
        """Connect the layer with what the engine's layers share."""
        self._handshake, self._collector, self._window = handshake, collector, window

    @property
    def window(self) -> WeightWindow:
        """The engine's, once connected."""
        assert self._window is not None
        return self._window

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
                "engine.mark_stale(). (FAQ: stale-weights)"
            )

    def start_count(
        self, counts_E: Tensor, scores_finite: Tensor, dtype: torch.dtype, shape_TK: torch.Size
    ) -> Callable[[], HandshakeTable]:
        """Begin to gather all ranks' counts. A collective.

        Args:
            counts_E: [E] int32, this rank's assignments to each expert.
            scores_finite: [] bool, whether the router's scores are.
            dtype: of the rows that this forward will exchange.
            shape_TK: this rank's tokens, and K.

        Raises:
            RuntimeError: when weights were written since they were last sent.
        """
        self._refuse_outdated()
        self.collector.on_forward()
        announced, self._announced = self._announced, None
        if announced is not None:
            return lambda: announced
        call = LayerCall(self.index, dtype, evaluates_sharded(self.experts), self.stale, shape_TK)
        return self.handshake.start(call, counts_E, scores_finite)

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
        table = self.wait_for_call(gather)
        self.slots.make_whole()
        return table.counts_WE(self.experts.num_experts)

    def wait_for_call(self, gather: Callable[[], HandshakeTable]) -> HandshakeTable:
        """Wait for what all ranks have announced, and for weights that are on their way. A collective.

        Args:
            gather: what `start_count` returned.

        Raises:
            RuntimeError: as `ForwardHandshake.start` says.
            FloatingPointError: on every rank, if any rank's scores are not finite.
        """
        table = gather()
        if table.any_stale:
            self.window.refill(self)
        self.window.advance(self)
        return table

    def weights(self) -> Mapping[str, Tensor]:
        """The slots by name, each [s, ...], which require gradients where the sharded parameters do."""
        # Freezing, toggling and fine-tuning schedules flip requires_grad on the sharded parameters alone.
        for name, sharded in self.experts.expert_parameters().items():
            self.slots.weights[name].requires_grad_(sharded.requires_grad)
        self.gradients.watch()
        return self.slots.weights

    def _on_gradients(self) -> None:
        if not self._leaves_by_rows:
            self.window.leave_backward(self, of_all_forwards=True)
        self.collector.on_gradients(self)

    def exchange_rows(
        self, rows_RD: Tensor, send_splits: list[int], receive_splits: list[int], dtype: torch.dtype | None
    ) -> Tensor:
        """Send rows to their ranks; differentiable. See `RankGroup.exchange_rows`."""
        return self._group.expert.exchange_rows(rows_RD, send_splits, receive_splits, dtype)

    def start_exchange(self, send: Tensor, send_splits: list[int], receive_splits: list[int]) -> Callable[[], Tensor]:
        """Begin to send numbers to their ranks. See `RankGroup.start_all_to_all`."""
        return self._group.expert.start_all_to_all(send, send_splits, receive_splits).wait

    def on_rewrite(self) -> None:
        """The module has overwritten its parameters: the slots are stale."""
        self.stale = True

    def _updated(self) -> list[str]:
        # A parameter that was frozen between backward and step still has a gradient, and was updated.
        return [name for name, p in self.experts.expert_parameters().items() if p.requires_grad or has_gradient(p)]

    def keeps_some(self) -> bool:
        """Whether the last update was not of all parameters: some are frozen."""
        return len(self._updated()) < len(self.experts.expert_parameters())

    def queue_distribution(self, placement: Placement, arrives_E: np.ndarray) -> bool:
        """Let the weights be sent to the ranks of `placement`.

        Args:
            placement: the next one.
            arrives_E: [E] bool, from `queue_distributions`.

        Returns:
            Whether there are any to be sent: experts may be frozen.
        """
        if self.holds_gradients():
            # Those that wait in the slots belong to the current placement.
            self.stale = True
            return False
        is_unchanged = np.array_equal(placement.slot_to_expert_S, self.placement.slot_to_expert_S)
        updated = self._updated()
        if is_unchanged and not updated and not arrives_E.any():
            return False
        self.slots.queue_distribution(placement, updated, arrives_E)
        return True

    def start_distribution(self) -> None:
        """Begin to send the weights that the slots will have. A collective of all groups."""
        sends_all = self.slots.start_distribution(allows_writes=self.stale)
        # What is frozen may be stale, too.
        self.stale = self.stale and not sends_all

    def end_forward(self, arrived_RD: Tensor, out_TD: Tensor, placement: Placement) -> None:
        """The layer has run: let backward say when it comes and goes, and free the slots unless it comes next.

        Takes what `ExpertParallelContext.end_forward` does.
        """
        self._leaves_by_rows = arrived_RD.requires_grad
        uses_weights = arrived_RD.requires_grad or any(slot.requires_grad for slot in self.slots.weights.values())
        if arrived_RD.requires_grad:
            # Its gradient is the last thing that backward computes with the slots.
            arrived_RD.register_hook(lambda _: self.window.leave_backward(self, of_all_forwards=False))
        if out_TD.requires_grad:
            # At every backward: one forward may have several (retain_graph=True), which train each time.
            out_TD.register_hook(lambda _: self._on_backward(placement, uses_weights))
        self.window.end_forward(self, trains=out_TD.requires_grad)

    def _on_backward(self, placement: Placement, uses_weights: bool) -> None:
        """Backward has reached the layer: its gradients will be collected at the end.

        Args:
            placement: of its forward.
            uses_weights: backward computes with the slots.

        Raises:
            RuntimeError: when the slots' weights have been replaced since that forward.
        """
        # After an evaluation with sharded experts, with which the forward before it shares its slots.
        self.slots.make_whole()
        # Freed slots would be filled with what the parameters are now.
        is_lost = not self.slots.has_memory and (self.stale or self.slots.is_outdated)
        if uses_weights and (is_lost or not self.slots.holds(placement)):
            raise RuntimeError(
                "backward through a forward from before the last optimizer step (or load): its experts' weights have "
                "been replaced since, as an in-place update would. Run forward again after each step. "
                "(FAQ: backward-after-step)"
            )
        if uses_weights:
            self.window.reach_backward(self)
        self.collector.on_backward(self)

    def holds_gradients(self) -> bool:
        """Whether gradients wait that are neither in `.grad` nor discarded by the user."""
        return self.gradients.are_waiting()

    @torch.no_grad()
    def serve(self, table: HandshakeTable) -> None:
        """Take part in the evaluation forward that other ranks have announced in `table`, without tokens."""
        self._announced = table
        device = self.slots.device
        x_TD = torch.empty(0, self.experts.dim, dtype=table.dtype, device=device)
        no_assignments = torch.empty(0, 1, device=device)
        is_finite = torch.ones((), dtype=torch.bool, device=device)
        started = self.experts.start(x_TD, no_assignments.long(), no_assignments, is_finite)
        if table.sharded:
            finish_sharded(self.experts, started)
        else:
            self.experts.finish(started)
