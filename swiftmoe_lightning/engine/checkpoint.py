"""Checkpoints know experts, never slots: whole tensors for a plain file, DTensors for a directory (DCP)."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from swiftmoe_lightning.comms import full_tensor, is_master
from swiftmoe_lightning.modules import shape_message

_META_FILE: Final = "meta.pt"


def full_state(value: Any, keep: bool) -> Any:
    """`value` (tensors in dicts, lists and tuples) with every master gathered whole, on the CPU. A collective.

    keep: False drops what was gathered, master by master (it becomes None), so that only the rank that writes
        holds it all.
    """
    if isinstance(value, dict):
        return type(value)((k, full_state(v, keep)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(full_state(v, keep) for v in value)
    if isinstance(value, Tensor) and is_master(value):
        whole = full_tensor(value)
        return whole.cpu() if keep else None
    return value


def is_checkpoint_directory(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory of `save_directory`."""
    return (Path(path) / _META_FILE).is_file()


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make room for `save_directory`, in place of the checkpoint that may be there. For one rank, before all save."""
    if is_checkpoint_directory(path):
        shutil.rmtree(path)
    Path(path).mkdir(parents=True, exist_ok=True)


def save_directory(
    path: str | os.PathLike[str], module: nn.Module, optimizers: list[Optimizer], meta: dict[str, Any], rank: int
) -> None:
    """Write a DCP directory, each rank its own shards, and `meta` (plain types and tensors) beside it. A collective.

    The model stands under "model", where Lightning's `consolidate_checkpoint` looks for it, and the i-th optimizer
    under "optimizer_i", by parameter name.
    """
    state: dict[str, Any] = {"model": get_model_state_dict(module)}
    for i, optimizer in enumerate(optimizers):
        state[f"optimizer_{i}"] = get_optimizer_state_dict(module, optimizer)
    dcp.save(state, checkpoint_id=path)
    if rank == 0:
        torch.save(meta, Path(path) / _META_FILE)


def load_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `meta` of a directory."""
    meta: dict[str, Any] = torch.load(Path(path) / _META_FILE, map_location="cpu", weights_only=True)
    return meta


def load_model(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Read the model of a directory, written at any world size. A collective.

    Raises ValueError, naming the key, where a shape differs.
    """
    state = {"model": get_model_state_dict(module)}
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, value in state["model"].items():
        size = getattr(saved.get(f"model.{name}"), "size", None)
        if isinstance(value, Tensor) and size is not None and size != value.shape:
            raise ValueError(shape_message(name, size, value.shape))
    _load(path, state)
    set_model_state_dict(module, state["model"])


def load_optimizers(path: str | os.PathLike[str], module: nn.Module, optimizers: list[Optimizer]) -> None:
    """Read the optimizers of a directory, written at any world size. A collective."""
    for i, optimizer in enumerate(optimizers):
        state = {f"optimizer_{i}": get_optimizer_state_dict(module, optimizer)}
        _load(path, state)
        set_optimizer_state_dict(module, optimizer, state[f"optimizer_{i}"])


def _load(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise ValueError(unreadable(path, f"{error}: {error.failures}")) from error


def unreadable(path: str | os.PathLike[str], reason: str) -> str:
    """What to say of a checkpoint that cannot be read."""
    return (
        f"cannot read the checkpoint {str(path)!r} ({reason}). It may be missing, cut off or corrupt, or hold objects "
        "that need Trainer.fit(..., weights_only=False): check the path, or use an older one."
    )
