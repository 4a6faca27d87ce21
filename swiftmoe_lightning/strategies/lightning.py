"""`Trainer(strategy="swiftmoe")`: maps Lightning's hooks to the engine's phases; no training logic of its own."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.overrides.distributed import _sync_module_states
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.distributed import is_sharded
from swiftmoe_lightning.engine import ExpertDataParallel, SwiftMoEEngine, ignore_expert_parameters
from swiftmoe_lightning.engine import checkpoint as checkpoints
from swiftmoe_lightning.placement import PlacementPolicy
from swiftmoe_lightning.strategies.checkpoint_io import WholeFileMixin
from swiftmoe_lightning.strategies.join import JoinCallback
from swiftmoe_lightning.strategies.precision import shard_precision
from swiftmoe_lightning.strategies.shard_dense import shard_dense
from swiftmoe_lightning.strategies.signals import note_agreed_stop, stop_together
from swiftmoe_lightning.strategies.start_methods import StartMethodMixin, TrainerLauncher
from swiftmoe_lightning.strategies.tensor_parallel import TensorParallelMixin

_STATE_KEY = "swiftmoe"
_DIRECTORY_KEY = "swiftmoe_directory"


class SwiftMoEStrategy(StartMethodMixin, TensorParallelMixin, WholeFileMixin, DDPStrategy):
    """Data-parallel training in which every MoE layer's experts are replicated by popularity, anew every step.

    Dense parameters train as under DDP, or by FSDP2 (see `dense`). Every option is JSON-able, for LightningCLI.

    Args:
        slots_per_rank, placement, replace_every, param_dtype, reduce_dtype, token_dtype, offload_optimizer,
            reshard_after_forward, token_split, exchange, dense, expert_parallel_size, evaluate: see `SwiftMoEConfig`.
        tensor_parallel_size: ranks that get the same batches; `configure_model` then finds a mesh in `device_mesh`, as
            under `ModelParallelStrategy`. None gives every rank batches of its own, and no mesh.
        save_distributed_checkpoint: save directories (torch.distributed.checkpoint, each rank its own shards) instead
            of one plain file. Both kinds load, whatever it is set to.
        **ddp_options: anything `DDPStrategy` takes (timeout, start_method, find_unused_parameters, ...).

    Raises:
        ValueError: for a setting out of range, or tensor_parallel_size with another start_method than "popen".
    """

    strategy_name = "swiftmoe"
    multiprocessing_launcher = TrainerLauncher

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
        tensor_parallel_size: int | None = None,
        save_distributed_checkpoint: bool = False,
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
        self._set_tensor_parallel_size(tensor_parallel_size)
        super().__init__(**ddp_options)
        if tensor_parallel_size is not None and self._start_method != "popen":
            raise ValueError(
                f"tensor_parallel_size={tensor_parallel_size} needs configure_model to find a mesh, and the process to "
                f"which start_method={self._start_method!r} returns the weights has none. Use torchrun, or 'popen'."
            )
        self._save_distributed_checkpoint = save_distributed_checkpoint
        self._engine: SwiftMoEEngine | None = None
        self._evaluating: bool | None = None

    @property
    def engine(self) -> SwiftMoEEngine:
        """The engine of the module being run.

        Raises:
            RuntimeError: before `Trainer.fit`, `validate`, `test` or `predict` has set it up.
        """
        if self._engine is None:
            raise RuntimeError(
                "SwiftMoEStrategy.engine exists once the Trainer runs a module: call trainer.fit first. Of ranks that "
                "spawn or fork started it is in their processes alone: read it in a callback."
            )
        return self._engine

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        if self._device_mesh is not None:
            self._module._device_mesh = self._device_mesh
        # Before the setup hooks: callbacks that copy the module there (EMA) then copy sharded parameters.
        self._attach()

    @override
    def setup(self, trainer: Trainer) -> None:
        self._evaluating = None
        JoinCallback.add_to(trainer)
        super().setup(trainer)
        if self.engine.layers:
            stop_together(trainer, self.engine)

    @override
    def model_to_device(self) -> None:
        # configure_model may have added layers, also on meta, and the precision plugin may have cast parameters.
        self._attach()
        super().model_to_device()
        self._attach()

    @override
    def configure_ddp(self) -> None:
        assert self.lightning_module is not None
        if self.engine.group is not None and self.config.dense != "ddp":
            shard_dense(self._module.trainer, self.engine)
        elif any(p.requires_grad and not is_sharded(p) for p in self.lightning_module.parameters()):
            super().configure_ddp()
        else:
            # DDP refuses a module without gradients to reduce.
            _sync_module_states(self.lightning_module)

    @override
    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        return ExpertDataParallel(model, self.engine, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for optimizer in self.optimizers:
            self.engine.prepare_optimizer(optimizer)

    def _attach(self) -> None:
        """Spread the experts that the module has by now. Repeatable."""
        module = self.lightning_module
        assert module is not None
        if self._engine is None or self._engine.module is not module:
            ranks: dict[str, Any] = {"ranks_per_node": self.num_processes, "tensor_mesh": self._device_mesh}
            self._engine = SwiftMoEEngine(module, self.config, device=self.root_device, **ranks)
            if self._engine.group is not None:
                self.precision_plugin = shard_precision(self.precision_plugin, self._engine)
        else:
            self._engine.attach(module)
        ignore_expert_parameters(module)

    # -- steps ----------------------------------------------------------------------------------------------------

    @override
    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        with super().block_backward_sync(), self.engine.no_sync():
            yield

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._enter(evaluating=False)
        output = super().training_step(*args, **kwargs)
        note_agreed_stop(self._module.trainer, self.engine)
        return output

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._enter(evaluating=True)
        with self.precision_plugin.val_step_context():
            return self._module.validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        self._enter(evaluating=True)
        with self.precision_plugin.test_step_context():
            return self._module.test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        self._enter(evaluating=True)
        with self.precision_plugin.predict_step_context():
            return self._module.predict_step(*args, **kwargs)

    @property
    def _module(self) -> LightningModule:
        # Evaluation calls the module without DDP, whose buffer broadcasts in every forward need equally many batches.
        assert self.lightning_module is not None
        return self.lightning_module

    def _enter(self, evaluating: bool) -> None:
        """Fetch the slots again at each change between training and evaluation, where EMA and others write weights."""
        if self._evaluating is not None and self._evaluating != evaluating:
            self.engine.mark_stale()
        if self.engine.dense is not None:
            self.engine.dense.begin_forward(evaluating)
        self._evaluating = evaluating

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        checkpoint = {**checkpoint, _STATE_KEY: self.engine.state_dict()}
        if not self._save_distributed_checkpoint:
            # Gathered here, after all hooks have added to the checkpoint (EMA adds a second model).
            full_checkpoint = checkpoints.full_state(checkpoint, keep=self.is_global_zero)
            checkpoints.save_file(self.checkpoint_io.save_checkpoint, full_checkpoint, filepath, storage_options)
            return
        if "current_model_state" in checkpoint:
            raise ValueError(
                "save_distributed_checkpoint=True does not hold the averaged weights of WeightAveraging. Use plain "
                "checkpoints (save_distributed_checkpoint=False)."
            )
        optimizers = self.optimizers if "optimizer_states" in checkpoint else []
        # Of the states Lightning looks only at the keys here; their values are loaded once their owners exist.
        meta = {k: type(v)() if k in ("state_dict", "optimizer_states") else v for k, v in checkpoint.items()}
        checkpoints.save_directory(self.broadcast(filepath), self._module, optimizers, meta)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {} if self._save_distributed_checkpoint else super().optimizer_state(optimizer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        error: Exception | None = None
        try:
            if checkpoints.is_checkpoint_directory(checkpoint_path):
                checkpoint = {**checkpoints.load_meta(checkpoint_path), _DIRECTORY_KEY: checkpoint_path}
            else:
                checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        except Exception as caught:
            error = caught
        if not self.reduce_boolean_decision(error is None):
            raise error or ValueError(checkpoints.unreadable(checkpoint_path, "another rank could not read it"))
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        # Layers of configure_model may still be on the meta device, where a load would be lost.
        self._attach()
        if _DIRECTORY_KEY in checkpoint:
            checkpoints.load_model(checkpoint[_DIRECTORY_KEY], self._module)
            self.engine.mark_stale()
        else:
            super().load_model_state_dict(checkpoint, strict=strict)
        if _STATE_KEY in checkpoint and self._module.trainer.state.fn == TrainerFn.FITTING:
            self.engine.load_state_dict(checkpoint[_STATE_KEY])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        if _DIRECTORY_KEY in checkpoint:
            checkpoints.load_optimizers(checkpoint[_DIRECTORY_KEY], self._module, self.optimizers)
            return
        states = checkpoint["optimizer_states"]
        if len(states) != len(self.optimizers):
            raise ValueError(
                f"the checkpoint holds the states of {len(states)} optimizers, and configure_optimizers returned "
                f"{len(self.optimizers)}. Return the optimizers that were saved, or load the weights alone."
            )
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    @override
    def teardown(self) -> None:
        if self._engine is None or self._engine.group is None:
            super().teardown()
            return
        # As in ModelParallelStrategy, parameters stay on their mesh's device, so that they can be gathered after fit.
        if self._layer_sync and self.model is not None and self._module.trainer.state.fn == TrainerFn.FITTING:
            self._layer_sync.revert(self._module)
        self.model = self._module
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()
