"""Checkpoints know experts, never slots: whole tensors for a plain file, DTensors for a directory (DCP)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from swiftmoe_lightning.comms import full_tensor, is_master

META_FILE: Final = "meta.pt"


def full_state(value: Any, keep: bool) -> Any:
    """`value` (tensors in dicts, lists and tuples) with every master gathered whole, on the CPU. A collective.

    keep: False drops what was gathered, master by master, so that only the rank that writes holds it all; those
        entries become None.
    """
    if isinstance(value, dict):
        return type(value)((k, full_state(v, keep)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(full_state(v, keep) for v in value)
    if isinstance(value, Tensor) and is_master(value):
        whole = full_tensor(value)
        return whole.cpu() if keep else None
    return value


def save_checkpoint_directory(
    path: str | os.PathLike[str], module: nn.Module, optimizers: list[Optimizer], meta: dict[str, Any], rank: int
) -> None:
    """Write a DCP directory, each rank its own shards, and `meta` beside it. A collective.

    The model stands under "model", where Lightning's `consolidate_checkpoint` looks, and optimizer i under
    "optimizer_i", by parameter name.
    """
    state = {"model": get_model_state_dict(module)}
    for i, optimizer in enumerate(optimizers):
        state[f"optimizer_{i}"] = get_optimizer_state_dict(module, optimizer)
    Path(path).mkdir(parents=True, exist_ok=True)
    dcp.save(state, checkpoint_id=path)
    if rank == 0:
        torch.save(meta, Path(path) / META_FILE)


def load_checkpoint_directory(
    path: str | os.PathLike[str], module: nn.Module, optimizers: list[Optimizer], strict: bool = True
) -> dict[str, Any]:
    """Read a directory of `save_checkpoint_directory` into module and optimizers, at any world size. A collective.

    Returns its `meta`. Raises ValueError, naming the key, when a shape differs.
    """
    state: dict[str, Any] = {"model": get_model_state_dict(module)}
    for i, optimizer in enumerate(optimizers):
        state[f"optimizer_{i}"] = get_optimizer_state_dict(module, optimizer)
    _check_shapes(path, state["model"])
    dcp.load(state, checkpoint_id=path)
    set_model_state_dict(module, state["model"])
    for i, optimizer in enumerate(optimizers):
        set_optimizer_state_dict(module, optimizer, state[f"optimizer_{i}"])
    meta: dict[str, Any] = torch.load(Path(path) / META_FILE, map_location="cpu", weights_only=True)
    return meta


def _check_shapes(path: str | os.PathLike[str], model_state: dict[str, Any]) -> None:
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, value in model_state.items():
        size = getattr(saved.get(f"model.{name}"), "size", None)
        if isinstance(value, Tensor) and size is not None and size != value.shape:
            raise ValueError(shape_message(name, size, value.shape))


def shape_message(name: str, saved: torch.Size, expected: torch.Size) -> str:
    """What to say when a checkpoint holds `name` with another shape."""
    return (
        f"{name!r} has shape {list(saved)} in the checkpoint, and {list(expected)} in this model. Build the model "
        "with the checkpoint's num_experts, dim and hidden_dim, or load another checkpoint."
    )
