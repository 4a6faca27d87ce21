"""Models that transformers sharded at load time, with `ep_implementation="swiftmoe"`, under `SwiftMoETrainer`.

transformers' own Trainer trains such a model, but refuses to write its optimizer, and cannot resume.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from swiftmoe_lightning.distributed import local_shard
from swiftmoe_lightning.engine import SwiftMoEEngine
from swiftmoe_lightning.engine.fully_sharded import reshard_all


def engine_of(model: nn.Module) -> SwiftMoEEngine | None:
    """The engine of the experts of a model that was loaded with `ep_implementation="swiftmoe"`; None for others."""
    engines = (vars(module).get("swiftmoe_engine") for module in model.modules())
    return next((engine for engine in engines if engine is not None), None)


def check_sharded_at_load(args: Any, config: object) -> None:
    """Refuse what a Trainer cannot do for such a model.

    Args:
        args: `TrainingArguments`.
        config: the Trainer's `SwiftMoEConfig`.

    Raises:
        ValueError: for a config, since the model has an engine, and for a loss scale.
    """
    if config is not None:
        raise ValueError(
            'the model was loaded with ep_implementation="swiftmoe", which made its engine. Call '
            "register_hf_experts(config) before from_pretrained, and leave swiftmoe_config out."
        )
    if getattr(args, "fp16", False):
        raise ValueError(
            "fp16=True: transformers clips the gradients of models that it has distributed without undoing the loss "
            "scale. Use bf16=True."
        )


def merge_groups(optimizer: Optimizer, parts: Sequence[list[nn.Parameter]]) -> None:
    """Give an optimizer that has not stepped the groups of a Trainer on one process, whose checkpoints then fit it.

    The Trainer splits its groups by the parameters' meshes, since stock optimizers cannot mix them. The engine's can.

    Args:
        optimizer: changed in place, unless its groups are no such split.
        parts: the parameters of each group.
    """
    options_of = {
        id(p): {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
        for p in group["params"]
    }
    parts = [part for part in parts if part]
    if sorted(id(p) for part in parts for p in part) != sorted(options_of):
        return
    if all(options_of[id(p)] == options_of[id(part[0])] for part in parts for p in part):
        optimizer.param_groups[:] = [{**options_of[id(part[0])], "params": part} for part in parts]


@contextmanager
def saves_models_only(args: Any) -> Iterator[None]:
    """Inside, `args.save_only_model` is set: the Trainer's constructor refuses to write optimizers of such models."""
    previous, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = previous


@torch.no_grad()
def copy_pretrained(model: Any, folder: str | os.PathLike[str], check: Any) -> None:
    """Read what `save_pretrained` wrote into a model that transformers has distributed. A collective.

    No rank has the whole model: it is read as it was loaded, each rank its part, and copied.

    Args:
        model: what is read into, in place.
        folder: where `save_pretrained` wrote.
        check: called with the loading info.
    """
    engine = engine_of(model)
    assert engine is not None
    saved, info = type(model).from_pretrained(
        folder, config=model.config, distributed_config=model.config.distributed_config, output_loading_info=True
    )
    check(info)
    # An evaluation leaves weights gathered.
    reshard_all(model)
    values = saved.state_dict()
    for name, own in model.state_dict().items():
        local_shard(own).copy_(local_shard(values[name]))
    engine.mark_stale()
