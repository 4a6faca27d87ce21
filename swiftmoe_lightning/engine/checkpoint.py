"""Checkpoints know experts, never slots: whole tensors for a plain file, DTensors for a directory (DCP)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from swiftmoe_lightning.comms import full_tensor, is_master
from swiftmoe_lightning.engine.safe_reading import SafePlanner, SafeReader
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
    """Whether `path` is a directory of `save_directory`, or was to become one."""
    return (Path(path) / _META_FILE).is_file() or Path(path).is_dir()


def save_directory(
    path: str | os.PathLike[str], module: nn.Module, optimizers: list[Optimizer], meta: dict[str, Any]
) -> None:
    """Write a DCP directory, each rank its own shards, and `meta` (plain types and tensors) beside it. A collective.

    It is written beside `path` and takes its place when it is whole: whenever the run is killed, one of them is. The
    one that was there stands as "<name>-previous" meanwhile, where `ckpt_path="last"` finds it, too.

    The model stands under "model", where Lightning's `consolidate_checkpoint` looks for it, and the i-th optimizer
    under "optimizer_i", by parameter name.

    Raises OSError, on all ranks, where it cannot be written; what was there is still there.
    """
    whole = Path(path)
    partial, previous = (
        whole.with_name(f"{whole.name}.partial"),
        whole.with_name(f"{whole.stem}-previous{whole.suffix}"),
    )
    try:
        _on_rank_zero(lambda: _make_room(whole, partial, previous))
        state: dict[str, Any] = {"model": get_model_state_dict(module)}
        for i, optimizer in enumerate(optimizers):
            state[f"optimizer_{i}"] = get_optimizer_state_dict(module, optimizer)
        dcp.save(state, checkpoint_id=partial)
        _on_rank_zero(lambda: _finish(meta, whole, partial, previous))
    except (CheckpointException, OSError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        causes = getattr(error, "failures", None) or {}
        said = "; ".join(f"rank {rank}: {cause[0]}" for rank, cause in causes.items()) or str(error)
        raise OSError(
            f"cannot write the checkpoint {str(path)!r} ({said}). Nothing of it is left, and one that was there still "
            "is: make room, or choose another folder."
        ) from error


def _make_room(whole: Path, partial: Path, previous: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    if previous.exists() and not whole.exists():
        # Killed between the two renames of `_finish`.
        os.rename(previous, whole)
    partial.mkdir(parents=True)


def _finish(meta: dict[str, Any], whole: Path, partial: Path, previous: Path) -> None:
    with (partial / _META_FILE).open("wb") as file:
        torch.save(meta, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(previous, ignore_errors=True)
    if whole.is_dir() and not whole.is_symlink():
        os.rename(whole, previous)
    else:
        whole.unlink(missing_ok=True)
    os.rename(partial, whole)
    shutil.rmtree(previous, ignore_errors=True)


def _on_rank_zero(action: Callable[[], None]) -> None:
    """Run `action` on rank 0; what it raises, all ranks raise. A collective."""
    said: list[str | None] = [None]
    is_spread = dist.is_available() and dist.is_initialized()
    if not is_spread or dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            said[0] = f"{type(error).__name__}: {error}"
    if is_spread:
        dist.broadcast_object_list(said, src=0)
    if said[0] is not None:
        raise OSError(said[0])


def load_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `meta` of a directory.

    Raises ValueError for one that was never finished.
    """
    if not (Path(path) / _META_FILE).is_file():
        raise ValueError(
            f"the directory lacks {_META_FILE}, which is written last: the run that saved it was stopped before it had "
            "finished"
        )
    meta: dict[str, Any] = torch.load(Path(path) / _META_FILE, map_location="cpu", weights_only=True)
    return meta


def load_model(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Read the model of a directory, written at any world size. A collective.

    Raises ValueError, naming the key, where a shape differs.
    """
    state = {"model": get_model_state_dict(module)}
    saved = _read_metadata(path).state_dict_metadata
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
        dcp.load(state, storage_reader=SafeReader(path), planner=SafePlanner())
    except CheckpointException as error:
        raise ValueError(unreadable(path, f"{error}: {error.failures}")) from error


def _read_metadata(path: str | os.PathLike[str]) -> Metadata:
    try:
        return SafeReader(path).read_metadata()
    # Of a damaged pickle anything may come.
    except Exception as error:
        raise ValueError(unreadable(path, f"{type(error).__name__}: {error}")) from error


def unreadable(path: str | os.PathLike[str], reason: str) -> str:
    """What to say of a checkpoint that cannot be read."""
    return (
        f"cannot read the checkpoint {str(path)!r} ({reason}). It may be missing, cut off or corrupt, or hold objects "
        "that need Trainer.fit(..., weights_only=False): check the path, or use an older one."
    )
