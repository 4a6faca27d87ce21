"""`SwiftMoEEngine`: the training step of every MoE layer in a module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from swiftmoe_lightning.config import SwiftMoEConfig, check_config, check_whole
from swiftmoe_lightning.distributed import ExpertGroup, extend_dtensors, phase
from swiftmoe_lightning.engine.arrivals import queue_distributions
from swiftmoe_lightning.engine.checkpoint import full_state
from swiftmoe_lightning.engine.data_parallel import ExpertDataParallel, ShardedDataParallel
from swiftmoe_lightning.engine.distribution_window import DistributionWindow
from swiftmoe_lightning.engine.fully_sharded import FullyShardedDense
from swiftmoe_lightning.engine.gradient_collector import GradientCollector
from swiftmoe_lightning.engine.gradients import (
    ShardedGradScaler,
    clip_grad_norm,
    clip_grad_value,
    grad_norm,
    settings_of,
)
from swiftmoe_lightning.engine.group_factory import device_of_module, make_group
from swiftmoe_lightning.engine.handshake import ForwardHandshake
from swiftmoe_lightning.engine.layer_state import LayerState, update_layer_states, update_router_biases
from swiftmoe_lightning.engine.placer_factory import make_placer
from swiftmoe_lightning.engine.prepared_optimizers import PreparedOptimizers
from swiftmoe_lightning.engine.save_pretrained import gather_before_save_pretrained
from swiftmoe_lightning.engine.sharded_layer import ShardedLayer
from swiftmoe_lightning.engine.stale_parameters import refuse_foreign, refuse_replaced, refuse_uncut
from swiftmoe_lightning.engine.stepped_layers import layers_stepped_by
from swiftmoe_lightning.engine.streamed_window import StreamedWindow
from swiftmoe_lightning.engine.weight_exchange import PHASES
from swiftmoe_lightning.placement import Placement, Placer


class SwiftMoEEngine:
    """Adaptive replication for every `Experts` layer of a module. One training step, in order:

    route, count, plan, dispatch, experts, combine    in forward: `MoE.forward`, `Experts.run`
    collect      inside backward, layer by layer: each expert's gradient -> the ranks that own its rows    (1)
    update       `optimizer.step()`, on this rank's rows alone; only `Muon` sends and gets some
    place        next placements from popularity; the same answer on every rank
    distribute   updated rows -> the experts' ranks in the next placements, two layers ahead of forward    (2)

    Construction is a collective: parameters of `Experts` are sharded in place (rank 0's values). Run the module
    through `data_parallel()`; then make optimizers, and pass them through `prepare_optimizer`. Without a process
    group, or on one rank, the module stays a plain MoE: the engine counts loads and moves router biases; unless
    offload_optimizer or reshard_after_forward keep weights elsewhere, which take a process group of one rank.

    Args:
        module: all its `Experts` layers take part.
        config: None takes the defaults.
        device: of the slots; None takes the module's, or the CPU for a module on meta.
        ranks_per_node: neighbouring ranks that share a node; None takes the launcher's.
        mesh: [groups, ranks of a group] or [ranks], of all ranks, instead of `config.expert_parallel_size`: a
            `DeviceMesh` of yours, or two axes of it, `mesh["dp", "ep"]`.
        tensor_mesh: [..., tensor-parallel ranks], of all ranks, if the dense part is tensor-parallel: ranks along its
            last axis have the same tokens, of which each computes a share. The dense part is cut over its other axes.

    Raises:
        ValueError: when the slots cannot hold the experts, groups do not fit the ranks, or for a config or
            ranks_per_node that is not valid.
        RuntimeError: for a config that needs a process group where there is none.
    """

    def __init__(
        self,
        module: nn.Module,
        config: SwiftMoEConfig | None = None,
        *,
        device: torch.device | str | None = None,
        ranks_per_node: int | None = None,
        mesh: DeviceMesh | None = None,
        tensor_mesh: DeviceMesh | None = None,
    ) -> None:
        self.module, self.config = module, check_config(config)
        if ranks_per_node is not None:
            check_whole(ranks_per_node=ranks_per_node)
        self.group: ExpertGroup | None = None
        self.dense: FullyShardedDense | None = None
        self._placer: Placer | None = None
        self._device = torch.device(device) if device is not None else device_of_module(module)
        self._fold = (ranks_per_node, mesh, tensor_mesh)
        self._wants_stop = False
        self._states: list[LayerState] = []
        self._collector = GradientCollector()
        self._optimizers = PreparedOptimizers(self._collector, self._end_step)
        self._window = StreamedWindow() if self.config.reshard_after_forward else DistributionWindow()
        self.attach(module)

    @property
    def layers(self) -> list[ShardedLayer]:
        """The layers that are spread over ranks; none on a single rank."""
        return [state.sharded for state in self._states if state.sharded is not None]

    @property
    def placements(self) -> dict[str, Placement]:
        """Each MoE layer's current placement, by the name of its `Experts` module."""
        return {state.name: state.experts.context.placement for state in self._states}

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that this rank has sent to others since the start, by phase: see `PHASES`; "update" is `Muon`'s."""
        sent = {phase: sum(layer.slots.bytes_sent[phase] for layer in self.layers) for phase in PHASES}
        return {**sent, "update": self._optimizers.bytes_sent}

    def attach(self, module: nn.Module) -> None:
        """Spread the module's new MoE layers. Call it again after adding, moving or casting layers. A collective."""
        self.module = module
        if self.group is None:
            self.group = make_group(self.config, self._device, *self._fold)
        if self.group is not None and self._placer is None:
            extend_dtensors()
            self._placer = make_placer(self.config, self.group)
        self._states = update_layer_states(module, self.group, self.config, self._device, self._states, self._placer)
        if self.group is not None and self.layers:
            max_experts = max(layer.experts.num_experts for layer in self.layers)
            names, token_dtype = [state.name for state in self._states], self.config.token_dtype
            handshake = ForwardHandshake(self.group, names, max_experts, self._device, token_dtype)
            self._window.connect(self.layers, self.group.replicate)
            for layer in self.layers:
                layer.connect(handshake, self._collector, self._window)
            gather_before_save_pretrained(module)

    def data_parallel(self, module: nn.Module | None = None, **ddp_options: Any) -> nn.Module:
        """Wrap the module to average dense gradients over ranks: in DDP, or by FSDP2, which cuts it in place.

        Use the wrapper for forward and `no_sync()`: its `module` is the wrapped module, its `engine` this engine. On
        one rank the module itself is returned.

        Args:
            module: to wrap instead of the engine's, if that is inside another wrapper (torch.compile's).
            **ddp_options: anything `DistributedDataParallel` takes.
        """
        module = self.module if module is None else module
        if self.group is None:
            return module
        if self.config.dense == "ddp":
            return ExpertDataParallel(module, self, **ddp_options)
        self.shard_dense()
        return ShardedDataParallel(module, self)

    def shard_dense(self) -> None:
        """Unless dense="ddp", cut the dense part over the ranks, in place, at the first call. A collective."""
        if self.config.dense != "ddp" and self.group is not None and self.dense is None:
            wire_dtype, is_hybrid = getattr(torch, self.config.reduce_dtype), self.config.dense == "hsdp"
            self.dense = FullyShardedDense(self.module, self.group, is_hybrid, wire_dtype, self._agree_on_dense)

    def _agree_on_dense(self, trains: bool) -> None:
        if self.layers:
            self.layers[0].handshake.call_dense(trains)

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """Let `optimizer` update local shards, and let its `step()` run "place" and "distribute". Returns it.

        Raises:
            ValueError: when it has parameters from before the engine or before `data_parallel()` cut them, or none of
                the module's, or when its update is neither elementwise nor that of `Muon`.
        """
        refuse_replaced(optimizer, {state.name: state.stale_parameters for state in self._states})
        if self.config.dense != "ddp" and self.group is not None:
            refuse_uncut(optimizer, None if self.dense is None else self.dense.stale_parameters, self.config.dense)
        if self._states:
            refuse_foreign(optimizer, self.module)
        self._optimizers.add(optimizer, self.module, None if self.group is None else self._device)
        return optimizer

    def _end_step(self, optimizer: Optimizer, others: list[Optimizer]) -> None:
        for layer in self.layers[:1]:
            layer.handshake.end_update()
        self.after_update(layers_stepped_by(optimizer, others, self._states))

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, backward leaves expert gradients in the slots; the first backward outside collects them all."""
        if self.dense is None:
            with self._collector.no_sync():
                yield
            return
        with self._collector.no_sync(), self.dense.no_sync():
            yield

    def collect(self) -> None:
        """Phase 1: gradients in slots -> `.grad`, averaged over ranks. Backward calls it at its end. A collective."""
        self._collector.collect()

    def after_update(self, states: list[LayerState] | None = None) -> None:
        """Phases 3 and 4, after an update of these layers (None: of all). `optimizer.step()` calls it. A collective."""
        states = self._states if states is None else states
        with phase("place"):
            placements = self.place([state for state in states if not state.holds_gradients()])
        self.distribute(states, placements)

    def place(self, states: list[LayerState]) -> dict[int, Placement]:
        """Phase 3: layer index -> next placement, where one is due; also moves router biases, alike in all groups."""
        step_loads = {state.name: state.end_step() for state in states}
        update_router_biases(step_loads, states, self.group)
        trained = [state for state in states if step_loads[state.name].num_assignments]
        if self._placer is None:
            return {}
        interval = self.config.replace_every if isinstance(self.config.replace_every, int) else 1
        due = {state.name: state for state in trained if state.num_steps % interval == 0}
        loads = {name: state.read_load_since_placed() for name, state in due.items()}
        placements = self._placer.next_placements(loads)
        return {due[name].index: placement for name, placement in placements.items()}

    def distribute(self, states: list[LayerState], placements: dict[int, Placement]) -> None:
        """Phase 4: send parameters' rows to the experts' ranks, layer by layer ahead of the next forward."""
        layers = [state.sharded for state in states if state.sharded is not None]
        placed = [(layer, placements.get(layer.index, layer.placement)) for layer in layers]
        self._window.add(queue_distributions(placed, self.group))

    def wait_for_weights(self) -> None:
        """Wait until all slots have the weights that were sent to them, as the layers' next forwards would."""
        self._window.finish()

    def mark_stale(self) -> None:
        """After a write to parameters (EMA, by hand): next forwards fill the slots again. Call on all ranks."""
        for layer in self.layers:
            layer.stale = True
        if self.dense is not None:
            self.dense.reshard()

    def request_stop(self) -> None:
        """Ask all ranks to stop. Call it on any rank, at any time, also in a signal handler."""
        self._wants_stop = True
        for layer in self.layers:
            layer.handshake.wants_stop = True

    @property
    def stops(self) -> bool:
        """Whether a rank has asked to stop; it turns True on all ranks in the same training forward."""
        return any(layer.handshake.stops for layer in self.layers) if self.layers else self._wants_stop

    def join(self) -> None:
        """At the end of an evaluation loop: take part in other ranks' forwards until all are done. A collective."""
        if self.dense is not None:
            # The other ranks gathered the dense weights in their first forward: a collective.
            self.dense.begin_forward(evaluates=True)
        if not self.layers:
            return
        # Ranks of other groups run forwards that this group may not, and all send weights in one order.
        self._window.flush()
        handshake = self.layers[0].handshake
        while len((table := handshake.done()).active_rows):
            self.layers[table.layer].serve(table)
        self._window.follow_other_groups()

    def grad_norm(self, norm_type: float = 2.0, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
        """The norm, [], over dense and expert gradients, of `parameters` or all; equal on all ranks. A collective."""
        return grad_norm(self._or_all(parameters), self.group, norm_type)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, parameters: Iterable[nn.Parameter] | None = None
    ) -> Tensor:
        """Clip by the norm over dense and expert gradients (see `clip_grad_norm`). A collective."""
        return clip_grad_norm(self._or_all(parameters), max_norm, self.group, norm_type)

    def clip_grad_value_(self, clip_value: float, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Clamp all gradients' elements to +-clip_value."""
        clip_grad_value(self._or_all(parameters), clip_value)

    def grad_scaler(self, device: str = "cuda", **options: Any) -> torch.amp.GradScaler:
        """A `torch.amp.GradScaler` with these options, which skips a step on all ranks or on none."""
        if self.group is None:
            return torch.amp.GradScaler(device, **options)
        return ShardedGradScaler(self.group, self._optimizers.updates, device, **options)

    def scaler_like(self, scaler: torch.amp.GradScaler, device: str) -> torch.amp.GradScaler:
        """`grad_scaler` with the settings of a stock scaler that has not scaled yet."""
        return self.grad_scaler(device, **settings_of(scaler))

    def full_state_dict(self) -> dict[str, Any]:
        """The module's state dict with every expert whole, on the CPU, on every rank. A collective."""
        return full_state(dict(self.module.state_dict()), keep=True)

    def state_dict(self) -> dict[str, Any]:
        """What to save beside model and optimizer: layers' popularity and placements. Loads with weights_only=True."""
        return {state.name: state.state_dict(self._placer) for state in self._states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved `state`. At another world size, placements are computed from its popularity."""
        for layer_state in self._states:
            if layer_state.name in state:
                layer_state.load_state_dict(state[layer_state.name], self._placer)

    def _or_all(self, parameters: Iterable[nn.Parameter] | None) -> Iterable[nn.Parameter]:
        return self.module.parameters() if parameters is None else parameters
