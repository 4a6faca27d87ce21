"""`Fabric(strategy="swiftmoe")`: the engine under Lightning Fabric's loops, which users write themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Literal

import torch
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import DDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.distributed import is_sharded
from swiftmoe_lightning.engine import ShardedGradScaler, SwiftMoEEngine
from swiftmoe_lightning.engine import checkpoint as checkpoints
from swiftmoe_lightning.engine.parameter_swap import parameter_names, refuse_stepped, swap_parameters
from swiftmoe_lightning.placement import PlacementPolicy
from swiftmoe_lightning.strategies.checkpoint_io import WholeFileMixin
from swiftmoe_lightning.strategies.start_methods import FabricLauncher, StartMethodMixin
from swiftmoe_lightning.strategies.tensor_parallel import TensorParallelMixin

# The entry of a checkpoint that holds each model's placements, by the key under which the user saves the model.
STATE_KEY: Final = "swiftmoe_engines"


class SwiftMoEFabricStrategy(StartMethodMixin, TensorParallelMixin, WholeFileMixin, DDPStrategy):
    """Fabric's data-parallel training in which every MoE layer's experts are replicated by popularity, anew every step.

    The loop stays as under "ddp": `setup` (optimizers may be made before it), `setup_module` and
    `setup_optimizers`, `backward`, `no_backward_sync`, `clip_gradients`, `save` and `load` (files hold whole experts,
    and go on under "ddp" and back). On one device the model is a plain MoE.

    Args:
        slots_per_rank, placement, replace_every, param_dtype, reduce_dtype, token_dtype, offload_optimizer,
            reshard_after_forward, token_split, exchange, dense, expert_parallel_size, evaluate: see `SwiftMoEConfig`.
        parallelize_fn: called with a module that is set up and `device_mesh`, as under `ModelParallelStrategy`; returns
            the module, with tensor-parallel dense layers.
        tensor_parallel_size: ranks that get the same batches. None gives every rank batches of its own, and no mesh.
        **ddp_options: anything Fabric's `DDPStrategy` takes (timeout, start_method, find_unused_parameters, ...).

    Raises:
        ValueError: for a setting out of range, or parallelize_fn without tensor_parallel_size.
    """

    multiprocessing_launcher = FabricLauncher

    def __init__(  # noqa: PLR0913 - public options
        self,
        slots_per_rank: int | None = None,
        placement: str | type[PlacementPolicy] = "balanced",
        replace_every: int | Literal["auto"] = 1,
        param_dtype: str | None = None,
        reduce_dtype: str = "float32",
        token_dtype: str | None = None,
        offload_optimizer: bool = False,
        reshard_after_forward: bool = False,
        token_split: str = "balanced",
        exchange: str = "flat",
        dense: str = "ddp",
        expert_parallel_size: int | None = None,
        evaluate: str = "placed",
        parallelize_fn: Callable[[nn.Module, DeviceMesh], nn.Module] | None = None,
        tensor_parallel_size: int | None = None,
        **ddp_options: Any,
    ) -> None:
        self.config = SwiftMoEConfig(
            slots_per_rank=slots_per_rank,
            placement=placement,
            replace_every=replace_every,
            param_dtype=param_dtype,
            reduce_dtype=reduce_dtype,
            token_dtype=token_dtype,
            offload_optimizer=offload_optimizer,
            reshard_after_forward=reshard_after_forward,
            token_split=token_split,
            exchange=exchange,
            dense=dense,
            expert_parallel_size=expert_parallel_size,
            evaluate=evaluate,
        )
        if parallelize_fn is not None and tensor_parallel_size is None:
            raise ValueError("parallelize_fn needs a mesh. Set tensor_parallel_size, the ranks of its last axis.")
        self._parallelize_fn = parallelize_fn
        self._set_tensor_parallel_size(tensor_parallel_size)
        super().__init__(**ddp_options)
        self._backward_sync_control = _SyncControl()
        self._engines: list[SwiftMoEEngine] = []
        # For each engine, the names of the whole parameters that it replaced: an optimizer may still have those.
        self._names: list[WeakIdKeyDictionary] = []

    @property
    def engine(self) -> SwiftMoEEngine:
        """The engine of the model that was set up last.

        Raises:
            RuntimeError: before `fabric.setup`.
        """
        if not self._engines:
            raise RuntimeError("SwiftMoEFabricStrategy.engine exists once a model is set up: call fabric.setup first.")
        return self._engines[-1]

    # -- set-up ---------------------------------------------------------------------------------------------------

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        engine = next((engine for engine in self._engines if engine.module is module), None)
        if engine is None:
            self._names.append(parameter_names(module))
            if self._parallelize_fn is not None:
                module = self._parallelize_fn(module, self.device_mesh)
            engine = SwiftMoEEngine(
                module,
                self.config,
                device=self.root_device,
                ranks_per_node=self.num_processes,
                tensor_mesh=self._device_mesh,
            )
            self._engines.append(engine)
            self._share_scaler(engine)
        else:
            engine.attach(module)
        device_ids = self._determine_ddp_device_ids()
        # A stream of its own, as in DDPStrategy, for CUDA graphs.
        context = nullcontext() if device_ids is None else torch.cuda.stream(torch.cuda.Stream())
        with context:
            return engine.data_parallel(module, device_ids=device_ids, **self._ddp_kwargs)

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        refuse_stepped(optimizer, "Set it up first, then step, or load with fabric.load.")
        for engine, names in zip(self._engines, self._names, strict=True):
            swap_parameters(optimizer, engine.module, names)
        sharded_by_id = {id(p): is_sharded(p) for group in optimizer.param_groups for p in group["params"]}
        holds_experts: dict[SwiftMoEEngine, bool] = {}
        for engine in self._engines:
            are_sharded = [sharded_by_id.pop(id(p)) for p in engine.module.parameters() if id(p) in sharded_by_id]
            if are_sharded:
                holds_experts[engine] = any(are_sharded)
        if sharded_by_id:
            raise ValueError(
                f"{len(sharded_by_id)} parameters of the optimizer belong to no model that has been set up. "
                "Call fabric.setup(model, optimizer), or fabric.setup_module(model) before "
                "setup_optimizers(optimizer). (FAQ: other-parameters)"
            )
        if sum(holds_experts.values()) > 1:
            raise ValueError(
                "the optimizer holds experts of several models. Make one optimizer for each of the models."
            )
        for engine, has_experts in holds_experts.items():
            # An optimizer with one model's experts may have dense parameters of another model as well: the engine of
            # the experts prepares it.
            if has_experts or not any(holds_experts.values()):
                engine.prepare_optimizer(optimizer)
        return optimizer

    def _share_scaler(self, engine: SwiftMoEEngine) -> None:
        """Let ranks skip a step together though each sees its own rows' gradients. The user's plugin is not changed."""
        plugin = self.precision
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is None or not engine.layers:
            return
        if isinstance(plugin.scaler, ShardedGradScaler):
            raise ValueError("at precision='16-mixed' one model with experts can be set up. Use 'bf16-mixed' for more.")
        self.precision = copy.copy(plugin)
        self.precision.scaler = engine.scaler_like(plugin.scaler, plugin.device)

    def _engine_of(self, module: nn.Module) -> SwiftMoEEngine | None:
        inner = module.module if isinstance(module, DistributedDataParallel) else module
        return next((engine for engine in self._engines if engine.module is inner), None)

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        self.precision.unscale_gradients(optimizer)
        parameters = self.precision.main_params(optimizer)
        norm = self.engine.clip_grad_norm_(max_norm, norm_type, parameters)
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients is non-finite, so it cannot be clipped. Pass "
                "error_if_nonfinite=False to fabric.clip_gradients to scale the gradients by it anyway."
            )
        return norm

    @override
    def clip_gradients_value(self, module: nn.Module, optimizer: Optimizer, clip_val: float | int) -> None:
        self.precision.unscale_gradients(optimizer)
        self.engine.clip_grad_value_(clip_val, self.precision.main_params(optimizer))

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(
        self, path: Any, state: dict[str, Any], storage_options: Any = None, filter: Any = None
    ) -> None:
        checkpoint = self._convert_stateful_objects_in_state(state, filter=filter or {})
        engines = {
            key: engine.state_dict()
            for key, value in state.items()
            if isinstance(value, nn.Module) and (engine := self._engine_of(value)) is not None
        }
        if engines:
            checkpoint[STATE_KEY] = engines
        full_checkpoint = checkpoints.full_state(checkpoint, keep=self.is_global_zero)
        checkpoints.save_file(self.checkpoint_io.save_checkpoint, full_checkpoint, path, storage_options)

    @override
    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        error: Exception | None = None
        remainder: dict[str, Any] = {}
        try:
            remainder = super().load_checkpoint(path, state, strict, weights_only)
        except Exception as caught:
            error = caught
        if not self.reduce_boolean_decision(error is None):
            raise error or ValueError(checkpoints.unreadable(path, "another rank could not read it"))
        if isinstance(state, dict) and state:
            for key, saved in remainder.pop(STATE_KEY, {}).items():
                engine = self._engine_of(state[key]) if isinstance(state.get(key), nn.Module) else None
                if engine is not None:
                    engine.load_state_dict(saved)
        return remainder


class _SyncControl(_BackwardSyncControl):
    """DDP's, but on one device, where DDP does not wrap the model, it does nothing."""

    @override
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        no_sync = getattr(module, "no_sync", nullcontext)
        return no_sync() if enabled else nullcontext()
