"""The engine under `transformers.Trainer`. It imports transformers, so the package imports it on first use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments
from typing_extensions import override

from swiftmoe_lightning.accelerate import (
    STATE_FILE,
    check_fresh,
    check_processes,
    data_parallel,
    gather_state_dicts,
    make_engine,
    share_scaler,
)
from swiftmoe_lightning.config import SwiftMoEConfig, check_config
from swiftmoe_lightning.engine import SwiftMoEEngine
from swiftmoe_lightning.engine.checkpoint import full_state, read_file
from swiftmoe_lightning.engine.checkpoint_files import save_whole
from swiftmoe_lightning.engine.parameter_swap import parameter_names, swap_parameters
from swiftmoe_lightning.huggingface.convert import convert
from swiftmoe_lightning.huggingface.sharded_at_load import (
    check_sharded_at_load,
    copy_pretrained,
    engine_of,
    merge_groups,
    saves_models_only,
)
from swiftmoe_lightning.private_names import check_names

# Methods that are overridden below and are not public. transformers 5 has them all.
_PRIVATE: Final = (
    "_wrap_model",
    "_save",
    "_save_optimizer_and_scheduler",
    "_load_optimizer_and_scheduler",
    "_load_from_checkpoint",
    "_load_best_model",
)
check_names("transformers", {Trainer: _PRIVATE}, "transformers>=5.13,<6")

# Training argument -> what to do instead, over several processes.
_REFUSED: Final = {
    "fp16_full_eval": "Evaluate in the precision of training, fp16=True or bf16=True.",
    "bf16_full_eval": "Evaluate in the precision of training, fp16=True or bf16=True.",
    "fsdp": "Leave it out: experts are cut over the processes already; swiftmoe_config=SwiftMoEConfig(dense='fsdp2') "
    "cuts the rest, too.",
    "deepspeed": "Leave it out: experts are cut over the processes already, and the rest is data parallel.",
}


class SwiftMoETrainer(Trainer):
    """`transformers.Trainer`, with the model's experts spread over the processes that torchrun started.

    Arguments, callbacks, evaluation and checkpoints stay the Trainer's own. A checkpoint holds whole experts, and the
    optimizer's state of them: it loads with `from_pretrained` and goes on at any number of processes. On one process
    this is a plain Trainer.

    Experts are spread when training begins, and `engine` is None before. Call `save_model` on all processes.

    A model that was loaded with `ep_implementation="swiftmoe"` stays as it is. `transformers.Trainer` trains it, too,
    but this one alone writes and resumes its optimizer, at any number of processes and any `ep_size`.

    Args:
        model: a Hugging Face MoE model, whose experts `convert` takes over, or any module with `Experts`.
        args: as of `transformers.Trainer`.
        *rest: as of `transformers.Trainer`.
        swiftmoe_config: None takes the defaults.
        **options: as of `transformers.Trainer`.

    Raises:
        ValueError: for a model without such experts, and over several processes for arguments that cannot be combined
            with spread experts.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *rest: Any,
        swiftmoe_config: SwiftMoEConfig | None = None,
        **options: Any,
    ) -> None:
        if args is not None:
            check_arguments(args)
        self.engine: SwiftMoEEngine | None = None
        self._swiftmoe_config = check_config(swiftmoe_config)
        self._prepared_optimizer: Optimizer | None = None
        self._drops_state = False
        self._whole: dict[str, Any] | None = None
        self._is_sharded_at_load = model is not None and engine_of(model) is not None
        if self._is_sharded_at_load:
            check_sharded_at_load(args, swiftmoe_config)
        elif model is not None:
            model = convert(model)
        with saves_models_only(args) if self._is_sharded_at_load and args is not None else nullcontext():
            super().__init__(model, args, *rest, **options)
        if not self._is_sharded_at_load:
            check_processes(self.accelerator, "Trainer", "TrainingArguments(..., use_cpu=True)")

    @override
    def call_model_init(self, trial: Any = None) -> nn.Module:
        return convert(super().call_model_init(trial))

    @override
    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        # Made from whole parameters, before the engine: then its groups are those of the plain Trainer, and a
        # checkpoint can be resumed by either.
        is_new = self.optimizer is None
        created: Optimizer = super().create_optimizer(model)
        # In a second `train()` Accelerate has wrapped it already.
        optimizer: Optimizer = getattr(created, "optimizer", created)
        if self._is_sharded_at_load:
            self.engine = engine_of(self.model)
            if is_new:
                merge_groups(optimizer, self._parameters_by_decay())
        elif self.engine is None or self.engine.module is not self.model:
            check_fresh(optimizer, self.model)
            names = parameter_names(self.model)
            self.engine = make_engine(self.accelerator, self.model, self._swiftmoe_config)
            self.engine.shard_dense()
            share_scaler(self.accelerator, self.engine)
            gather_state_dicts(self.accelerator)
            swap_parameters(optimizer, self.model, names)
        assert self.engine is not None
        if optimizer is not self._prepared_optimizer:
            self.engine.prepare_optimizer(optimizer)
            self._prepared_optimizer = optimizer
            # Registered after the engine's own hook, which makes DTensors of local state.
            optimizer.register_state_dict_post_hook(lambda _, state: full_state(state, keep=not self._drops_state))
        return created

    @override
    def _wrap_model(self, model: nn.Module, training: bool = True, *rest: Any, **options: Any) -> nn.Module:
        wrapped: nn.Module = super()._wrap_model(model, training, *rest, **options)
        if not training or wrapped is not self.model or self.engine is None or self.engine.group is None:
            return wrapped
        if self._is_sharded_at_load:
            # transformers has cut the dense part, and FSDP2 averages its gradients.
            return wrapped
        # Adds autocast and compilation. The Trainer does not wrap a model again that is returned wrapped.
        wrapped = self.accelerator.prepare_model(wrapped, evaluation_mode=True)
        return data_parallel(self.accelerator, self.engine, wrapped)

    def _parameters_by_decay(self) -> list[list[nn.Parameter]]:
        """The parameters that weight decay applies to, and the others, as the Trainer groups them."""
        decayed = set(self.get_decay_parameter_names(self.model))
        trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        return [[p for name, p in trained if (name in decayed) is decays] for decays in (True, False)]

    def _has_mixed_mesh_grads(self, model: nn.Module) -> bool:
        # False selects Accelerate's clipping, which takes DTensors and plain tensors together. The Trainer's own
        # clipping does not undo a loss scale, but takes parameters of several meshes.
        return self._is_sharded_at_load

    @override
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        # A collective, so it is made here, which runs on all processes: transformers 5.17 calls `_save` on one.
        if self.engine is not None and self.engine.group is not None and not self._is_sharded_at_load:
            self._whole = full_state(dict(self.model.state_dict()), keep=self.args.should_save)
        super().save_model(output_dir, _internal_call)
        self._whole = None

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, self._whole if state_dict is None else state_dict)

    @override
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            # All ranks take part in the gathering, and the writer alone keeps the result.
            self._drops_state = True
            self.optimizer.state_dict()
            self._drops_state = False
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self.engine is not None:
            save_whole(self.engine.state_dict(), Path(output_dir, STATE_FILE))

    @override
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        # A plain Trainer's folder has no such file, and placements then start anew.
        if checkpoint is not None and self.engine is not None and Path(checkpoint, STATE_FILE).exists():
            self.engine.load_state_dict(read_file(Path(checkpoint, STATE_FILE)))

    @override
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if not isinstance(model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif self._is_sharded_at_load:
            copy_pretrained(model, resume_from_checkpoint, lambda info: check_loaded(resume_from_checkpoint, info))
        else:
            load_pretrained(model, resume_from_checkpoint)

    @override
    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def check_arguments(args: TrainingArguments) -> None:
    """Refuse what cannot be combined with spread experts.

    Raises:
        ValueError: on every process, for one process with several GPUs, and over several processes for another
            parallelism, evaluation in another precision, or even_batches=False.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"one process was started for {args.n_gpu} GPUs, and experts are spread over processes. Start one for each "
            f"GPU: torchrun --nproc-per-node {args.n_gpu} script.py (FAQ: one-process)"
        )
    if args.world_size == 1:
        return
    for name, fix in _REFUSED.items():
        if value := getattr(args, name, None):
            raise ValueError(
                f"{name}={value!r} cannot be combined with experts spread over processes. {fix} "
                "(FAQ: other-parallelism)"
            )
    if getattr(args.accelerator_config, "even_batches", True) is False:
        raise ValueError(
            "even_batches=False gives processes different numbers of batches, and the Trainer would wait for ever "
            "where it gathers losses. Leave it True: what evaluation repeats is dropped from its metrics. "
            "(FAQ: uneven-batches)"
        )


def load_pretrained(model: PreTrainedModel, folder: str | os.PathLike[str]) -> None:
    """Read what `save_pretrained` wrote into a model whose experts may be spread. No communication.

    The Trainer's own loader takes names as they are in the file, and many MoE families are written with a tensor for
    each expert: it would leave the experts as they are, with a warning. `from_pretrained` converts the names.

    Args:
        model: what is read into, in place.
        folder: where `save_pretrained` wrote.

    Raises:
        ValueError: naming the keys, where the files and the model differ.
    """
    saved, info = type(model).from_pretrained(folder, config=model.config, output_loading_info=True)
    check_loaded(folder, info)
    model.load_state_dict(saved.state_dict())


def check_loaded(folder: str | os.PathLike[str], info: Mapping[str, Any]) -> None:
    """Refuse a folder that `from_pretrained` could not read all of, or that does not hold all of the model.

    Args:
        folder: that was read.
        info: what `from_pretrained` has returned besides the model.

    Raises:
        ValueError: naming the keys.
    """
    wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        raise ValueError(
            f"{str(folder)!r} belongs to another model: {wrong}. Build the model that was saved, or resume from "
            "another checkpoint. (FAQ: another-model)"
        )
