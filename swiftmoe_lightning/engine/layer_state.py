"""The engine's state of each MoE layer: the load since its last step, its placement, and what a checkpoint keeps of it.

W ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.distributed import ExpertGroup, is_sharded
from swiftmoe_lightning.engine.hidden_pieces import HiddenPieces
from swiftmoe_lightning.engine.materialize import materialize_dense
from swiftmoe_lightning.engine.shard_parameters import refuse_fully_sharded, shard_parameters
from swiftmoe_lightning.engine.sharded_layer import ShardedLayer
from swiftmoe_lightning.engine.slots import ExpertSlots
from swiftmoe_lightning.engine.stale_parameters import StaleParameters
from swiftmoe_lightning.modules import Experts, MoE, TopKRouter, TrainedLoad, hidden_cuts
from swiftmoe_lightning.placement import ExpertLoad, Placement, Placer

# Keys of `LayerState.state_dict`.
_SAVED: Final = ("popularity", "slot_to_expert", "world_size", "num_steps", "placer")


class LayerState:
    """An `Experts` module with its counters, and its `ShardedLayer` when it is spread over ranks.

    Args:
        index: of the layer among the module's layers.
        name: of the `Experts` module.
        experts: the module itself.
        router: of the MoE block around it, if any.

    Attributes:
        sharded: None on one rank.
        num_steps: training steps that have trained it.
        stale_parameters: the parameters that sharded ones have replaced.
    """

    def __init__(self, index: int, name: str, experts: Experts, router: nn.Module | None) -> None:
        self.index, self.name, self.experts, self.router = index, name, experts, router
        self.sharded: ShardedLayer | None = None
        self.num_steps = 0
        self._since_step, self._since_placed = experts.load_cursor(), experts.load_cursor()
        self._step: ExpertLoad | None = None
        self.stale_parameters = StaleParameters()

    def shard(
        self, group: ExpertGroup, config: SwiftMoEConfig, device: torch.device, placement: Placement | None
    ) -> None:
        """Spread the experts over the ranks (again). A collective.

        Args:
            group: the ranks.
            config: the engine's.
            device: where the slots live.
            placement: the first; None for experts that have one.
        """
        shard_device = torch.device("cpu") if config.offload_optimizer else device
        replaced = shard_parameters(self.experts, group, shard_device, pins=shard_device.type != device.type)
        self.stale_parameters.add(replaced.values())
        if self.sharded is None:
            assert placement is not None
            slots = ExpertSlots(
                self.experts.expert_parameters,
                group,
                placement,
                device,
                None if config.param_dtype is None else getattr(torch, config.param_dtype),
                getattr(torch, config.reduce_dtype),
                self._pieces(group, config, device),
            )
            token_dtype = None if config.token_dtype is None else getattr(torch, config.token_dtype)
            self.sharded = ShardedLayer(self.index, self.experts, slots, group, config.token_split, token_dtype)
            self.experts.trained_load = TrainedLoad(placement)
            self.experts.context = self.sharded
            self.sharded.accept_full_state_dicts()
        self.sharded.stale = True

    def _pieces(self, group: ExpertGroup, config: SwiftMoEConfig, device: torch.device) -> HiddenPieces | None:
        if config.evaluate == "placed" or group.expert.size == 1:
            return None
        return HiddenPieces(hidden_cuts(self.experts, group.expert.size, device), group.expert, device)

    def holds_gradients(self) -> bool:
        """Whether gradients wait in the slots (accumulation)."""
        return self.sharded is not None and self.sharded.holds_gradients()

    def end_step(self) -> ExpertLoad:
        """End a training step: read its load."""
        load = self._since_step.read()
        if load.num_assignments:
            self.num_steps += 1
            self._step = load
        return load

    def read_load_since_placed(self) -> ExpertLoad:
        """The load since the last call, that is, since the last placement."""
        return self._since_placed.read()

    def state_dict(self, placer: Placer | None) -> dict[str, Any]:
        """Plain tensors and numbers. Slots in it are used only at the same world size.

        Args:
            placer: None on one rank.
        """
        placement = self.experts.context.placement
        popularity_E = self._step.popularity_E if self._step else np.zeros(placement.num_experts, np.int64)
        return {
            "popularity": torch.from_numpy(popularity_E),
            "slot_to_expert": torch.from_numpy(placement.slot_to_expert_S),
            "world_size": placement.world_size,
            "num_steps": self.num_steps,
            "placer": {k: torch.from_numpy(v) for k, v in placer.state_dict(self.name).items()} if placer else None,
        }

    def load_state_dict(self, state: dict[str, Any], placer: Placer | None) -> None:
        """Take the saved placement if it fits these ranks and slots, else compute one from the saved loads.

        Args:
            state: from `state_dict`, at any world size.
            placer: None on one rank.

        Raises:
            ValueError: when `state` lacks a key.
        """
        missing = [key for key in _SAVED if key not in state]
        if missing:
            raise ValueError(
                f"what the checkpoint says of the placement of {self.name!r} lacks {missing}: it was edited, or "
                "saved by another version of this package. Take its 'swiftmoe' entry out, and placements start from "
                "nothing."
            )
        self.num_steps = state["num_steps"]
        if self.sharded is None or placer is None:
            return
        if state["placer"] is None:
            placer.observe(self.name, state["popularity"].numpy())
        else:
            placer.load_state_dict(self.name, {k: v.numpy() for k, v in state["placer"].items()})
        current, saved = self.sharded.placement, state["slot_to_expert"].numpy()
        if state["world_size"] == current.world_size and saved.size == current.slot_to_expert_S.size:
            placement = Placement(saved, current.num_experts, current.world_size)
        else:
            placement = placer.planned({self.name: current.num_experts})[self.name]
        # Gradients that wait in the slots belong to the current placement.
        if not self.holds_gradients():
            slots = self.sharded.slots
            slots.queue_distribution(placement, self.experts.expert_parameters().keys(), slots.arrivals(placement))
        self.sharded.stale = True


def _refuse_wrapped_or_quantized(name: str, experts: Experts) -> None:
    """Raise ValueError for experts inside an adapter or parametrization, or quantized ones."""
    if name.rpartition(".")[2] == "base_layer" or "parametrizations" in experts._modules:
        raise ValueError(
            f"the experts {name!r} are wrapped (an adapter), and forward would not see what is spread over the ranks. "
            "PEFT's LoRA becomes part of the experts by sml.convert(model), before the engine; merge or unload another "
            "adapter, or give it dense layers alone as its targets. "
            "(FAQ: experts-not-plain)"
        )
    for key, parameter in experts.expert_parameters().items():
        is_plain = nn.Parameter in type(parameter).__mro__ or is_sharded(parameter)
        if not is_plain or not parameter.is_floating_point() or parameter.element_size() == 1:
            kind = parameter.dtype if is_plain else type(parameter).__name__
            raise ValueError(
                f"{key} of the experts {name!r} is quantized ({kind}), which can be neither cut over the ranks nor "
                "updated. Build or load the experts in float32, bfloat16 or float16, and leave them out of "
                "quantization. (FAQ: experts-not-plain)"
            )


def _routers(module: nn.Module) -> dict[int, nn.Module]:
    """id of an `Experts` module -> the router of the MoE block around it."""
    routers: dict[int, nn.Module] = {}
    for name, block in module.named_modules():
        if not isinstance(block, MoE):
            continue
        if routers.setdefault(id(block.experts), block.router) is not block.router:
            raise ValueError(
                f"the experts of {name!r} are also those of a block with another router: loads, and the router biases "
                "that follow them, would be of both. Give each router experts of its own, or the blocks one router."
            )
    return routers


def update_router_biases(
    loads: Mapping[str, ExpertLoad], states: Iterable[LayerState], group: ExpertGroup | None
) -> None:
    """Move the biases of routers that balance by them, alike in all expert groups. A collective if there are several.

    Args:
        loads: layer name -> its load in the step, in this group.
        states: of these layers.
        group: None on one rank.
    """
    routers = {
        s.name: s.router for s in states if isinstance(s.router, TopKRouter) and s.router.expert_bias is not None
    }
    if not routers:
        return
    popularity = torch.from_numpy(np.concatenate([loads[name].popularity_E for name in routers]))
    if group is not None and group.replicate is not None:
        device = next(iter(routers.values())).weight.device
        popularity = group.replicate.all_reduce(popularity.to(device)).cpu()
    sizes = [len(loads[name].popularity_E) for name in routers]
    for router, popularity_E in zip(routers.values(), popularity.split(sizes), strict=True):
        if popularity_E.any():
            router.update_bias(popularity_E.numpy())


def update_layer_states(
    module: nn.Module,
    group: ExpertGroup | None,
    config: SwiftMoEConfig,
    device: torch.device,
    previous: list[LayerState],
    placer: Placer | None,
) -> list[LayerState]:
    """One `LayerState` for every `Experts` module, in the module's order; those of `previous` are kept. A collective.

    Args:
        module: with the layers.
        group: None on one rank.
        config: the engine's.
        device: of the slots.
        previous: the states so far.
        placer: None on one rank.

    Raises:
        ValueError: for experts inside an adapter, quantized, cut by FSDP2, or under two routers.
    """
    router_of = _routers(module)
    if group is not None:
        refuse_fully_sharded(module, group)
    previous_by_id = {id(state.experts): state for state in previous}
    states: list[LayerState] = []
    for name, experts in module.named_modules():
        if isinstance(experts, Experts):
            if group is not None:
                _refuse_wrapped_or_quantized(name, experts)
            state = previous_by_id.get(id(experts))
            states.append(state or LayerState(len(states), name, experts, router_of.get(id(experts))))
    new = {state.name: state.experts.num_experts for state in states if state.sharded is None}
    # All at once, as after every step: a policy may remember the layers that it was asked for.
    first = placer.planned(new) if placer is not None and new else {}
    for index, state in enumerate(states):
        state.index = index
        if group is not None:
            state.shard(group, config, device, first.get(state.name))
            assert state.sharded is not None
            state.sharded.index = index
    materialize_dense(module, device)
    return states
