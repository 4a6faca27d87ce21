"""`prepare`, and what an Accelerate loop and `transformers.Trainer` have in common."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from torch import nn
from torch.optim import Optimizer

from swiftmoe_lightning.accelerate.parallel_axes import check_processes, make_engine
from swiftmoe_lightning.config import SwiftMoEConfig, check_config
from swiftmoe_lightning.engine import ShardedGradScaler, SwiftMoEEngine
from swiftmoe_lightning.engine.checkpoint import full_state, read_file
from swiftmoe_lightning.engine.checkpoint_files import save_whole
from swiftmoe_lightning.engine.parameter_swap import parameter_names, refuse_stepped, swap_parameters

if TYPE_CHECKING:
    from accelerate import Accelerator

# Name in a folder of `accelerator.save_state`, beside the files that Accelerate itself writes and reads.
STATE_FILE: Final = "swiftmoe.pt"


def prepare(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    *rest: Any,
    config: SwiftMoEConfig | None = None,
    **ddp_options: Any,
) -> tuple[Any, ...]:
    """Like `accelerator.prepare(model, optimizer, *rest)`, with the model's experts spread over the processes.

    The loop stays as it is: `accumulate`, `backward`, clipping, schedulers, mixed precision, `save_state` and
    `load_state` (whose folders a plain Accelerate run reads and writes alike), `get_state_dict`, `unwrap_model`. The
    engine is `model.engine` of what is returned; on one process the model is returned as Accelerate prepares it.

    Args:
        accelerator: of data parallelism, or with a `ParallelismConfig`: see `parallel_axes`.
        model: with `Experts`, not prepared before, and parallelized by the user on the accelerator's tp axis.
        optimizer: made from `model.parameters()`, without a step so far. The experts' sharded parameters replace the
            whole ones in it.
        *rest: data loaders, schedulers and more optimizers, in any order.
        config: None takes the defaults.
        **ddp_options: as of `DistributedDataParallel`; they go before those of the accelerator's `kwargs_handlers`.

    Returns:
        (model, optimizer, *rest), prepared. A collective.

    Raises:
        ValueError: for a model or optimizer that was prepared before, an optimizer of other parameters or one that has
            stepped, another parallelism of Accelerate's, processes that it does not see, or a second model in float16.
        TypeError: for arguments in another order.
    """
    check_processes(accelerator, "Accelerator", "Accelerator(cpu=True)")
    _warn_of_one_process(accelerator)
    optimizers = [optimizer, *(thing for thing in rest if isinstance(thing, Optimizer))]
    for each in optimizers:
        _check_inputs(accelerator, model, each)
    if isinstance(accelerator.scaler, ShardedGradScaler):
        raise ValueError("with mixed_precision='fp16' one model with experts can be prepared. Use 'bf16' for more.")
    if accelerator.num_processes == 1 and not check_config(config).spreads_one_rank:
        engine = SwiftMoEEngine(model, config)
        for each in optimizers:
            engine.prepare_optimizer(each)
        return tuple(accelerator.prepare(model, optimizer, *rest))
    names = parameter_names(model)
    callable_model = accelerator.prepare_model(model, evaluation_mode=True)
    engine = make_engine(accelerator, model, config)
    wrapped = data_parallel(accelerator, engine, callable_model, **ddp_options)
    for each in optimizers:
        swap_parameters(each, model, names)
        engine.prepare_optimizer(each)
        # Registered after the engine's own hook, which makes DTensors of local state: Accelerate's files hold whole
        # tensors.
        each.register_state_dict_post_hook(lambda _, state: full_state(state, keep=True))
    share_scaler(accelerator, engine)
    gather_state_dicts(accelerator)
    add_to_folders(accelerator, callable_model, engine)
    prepared = accelerator.prepare(optimizer, *rest)
    return (wrapped, *(prepared if isinstance(prepared, tuple) else (prepared,)))


def data_parallel(accelerator: Accelerator, engine: SwiftMoEEngine, module: nn.Module, **ddp_options: Any) -> nn.Module:
    """The engine's wrapper around `module`, with the options and communication hook that Accelerate's DDP would have.

    Args:
        accelerator: of the processes, and of the options in its `kwargs_handlers`.
        engine: whose `data_parallel` wraps it.
        module: the engine's, as Accelerate has prepared it for calls.
        **ddp_options: as of `DistributedDataParallel`; they go before those of the accelerator's `kwargs_handlers`.
    """
    handler = accelerator.ddp_handler
    defaults = {} if handler is None else handler.to_kwargs()
    if accelerator.device.type != "cpu":
        defaults["device_ids"] = [accelerator.device.index]
    wrapped = engine.data_parallel(module, **{**defaults, **ddp_options})
    if handler is not None and engine.dense is None:
        # The hook sees dense gradients only; those of experts are sent in `reduce_dtype`.
        handler.register_comm_hook(wrapped)
    return wrapped


def share_scaler(accelerator: Accelerator, engine: SwiftMoEEngine) -> None:
    """Let the processes skip a step together, if there is a loss scaler. Call it before optimizers are prepared."""
    if accelerator.scaler is not None and engine.group is not None:
        accelerator.scaler = engine.scaler_like(accelerator.scaler, accelerator.device.type)


def _warn_of_one_process(accelerator: Accelerator) -> None:
    if accelerator.num_processes == 1 and "ACCELERATE_MIXED_PRECISION" in os.environ:
        warnings.warn(
            "`accelerate launch` started one process, so there are no ranks to spread experts over. On GPUs add "
            "--multi_gpu --num_processes N; on the CPU start N processes with torchrun --nproc-per-node N, and make "
            "Accelerator(cpu=True). (FAQ: one-process)",
            stacklevel=3,
        )


def _check_inputs(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> None:
    if isinstance(model, Optimizer) or not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"prepare takes the accelerator, the model, then the optimizer, got a {type(model).__name__} and a "
            f"{type(optimizer).__name__}. Data loaders and schedulers come after them."
        )
    prepared = [
        type(thing).__name__
        for thing in (model, optimizer)
        if getattr(thing, "_is_accelerate_prepared", False) or isinstance(thing, nn.parallel.DistributedDataParallel)
    ]
    if prepared or model in accelerator._models or type(optimizer).__name__ == "AcceleratedOptimizer":
        raise ValueError(
            "this model or optimizer has been prepared already. Call swiftmoe_lightning.accelerate.prepare instead of "
            "accelerator.prepare, once, with the model and the optimizer as they were built."
        )
    check_fresh(optimizer, model)


def check_fresh(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer, unless it is of this model's parameters and has not stepped.

    Raises:
        ValueError: for an optimizer of other parameters, or one that has stepped.
    """
    ids_of_model = {id(parameter) for parameter in model.parameters()}
    foreign = sum(id(p) not in ids_of_model for group in optimizer.param_groups for p in group["params"])
    if foreign:
        raise ValueError(
            f"{foreign} parameters of the optimizer are not the model's. Make it from the parameters of the very model "
            "that is prepared. (FAQ: other-parameters)"
        )
    refuse_stepped(optimizer, "Prepare first, then step, or load with accelerator.load_state.")


def gather_state_dicts(accelerator: Accelerator) -> None:
    """Let `accelerator.get_state_dict`, and what saves by it, return whole experts on every process."""
    get_state_dict: Callable[..., Any] = accelerator.get_state_dict

    @functools.wraps(get_state_dict)
    def get_whole(*args: Any, **kwargs: Any) -> Any:
        return full_state(get_state_dict(*args, **kwargs), keep=True)

    accelerator.get_state_dict = get_whole


def add_to_folders(accelerator: Accelerator, prepared: nn.Module, engine: SwiftMoEEngine) -> None:
    """Let `save_state` write the placements of `prepared`, and `load_state` load weights into sharded parameters.

    The user's own hooks may save and load the weights in place of Accelerate: those of all models, or of none.

    Args:
        accelerator: whose folders they are.
        prepared: the model as the accelerator keeps it.
        engine: of its experts.
    """

    def state_file(folder: str) -> Path:
        index = next(i for i, model in enumerate(accelerator._models) if model is prepared)
        return Path(folder, _numbered(STATE_FILE, index))

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if accelerator.is_main_process:
            save_whole(engine.state_dict(), state_file(folder))

    def load(models: list[nn.Module], folder: str) -> None:
        _load_models(models, Path(folder))
        # A folder of a plain run has no such file, and placements then start anew.
        if state_file(folder).exists():
            engine.load_state_dict(read_file(state_file(folder)))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _load_models(models: list[nn.Module], folder: Path) -> None:
    """Load all models' weights instead of Accelerate, whose loader needs storages, which DTensors do not show. A folder
    without weights is left to the user's hooks, and to Accelerate's error."""
    paths = [path for index in range(len(models)) if (path := _weights_file(folder, index)) is not None]
    if not paths:
        return
    if len(paths) < len(models):
        raise ValueError(
            f"{folder} holds the weights of {len(paths)} models ({', '.join(path.name for path in paths)}), and "
            f"{len(models)} were prepared. Let your hooks take the weights of all models at save_state, or of none."
        )
    for model, path in zip(models, paths, strict=True):
        load_whole(model, path)
    models.clear()


def _weights_file(folder: Path, index: int) -> Path | None:
    paths = (folder / _numbered(name, index) for name in ("model.safetensors", "pytorch_model.bin"))
    return next((path for path in paths if path.exists()), None)


def _numbered(name: str, index: int) -> str:
    """`name` for the model of this index, numbered as Accelerate numbers the files of several models."""
    stem, _, suffix = name.partition(".")
    return f"{stem}_{index}.{suffix}" if index else name


def load_whole(model: nn.Module, path: Path) -> None:
    """Load a model's weights from a file that Accelerate wrote. No communication.

    Args:
        model: what is read into, in place; its experts may be spread.
        path: a `.safetensors` file, or one that `torch.save` wrote.

    Raises:
        ValueError: naming the keys, where the file and the model differ.
    """
    from safetensors.torch import load_file

    state = load_file(path) if path.suffix == ".safetensors" else read_file(path)
    incompatible = model.load_state_dict(state, strict=False)
    parameters = model.state_dict(keep_vars=True)
    # Of several names that share a weight, the file has one.
    loaded_ids = {id(parameters[name]) for name in state if name in parameters}
    missing = [name for name in incompatible.missing_keys if id(parameters[name]) not in loaded_ids]
    if missing or incompatible.unexpected_keys:
        raise ValueError(
            f"{path} belongs to another model: it lacks {missing}, and holds {incompatible.unexpected_keys} that this "
            "one does not have. Build the model that was saved, or load another folder. (FAQ: another-model)"
        )
