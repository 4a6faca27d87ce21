"""Writes and reads checkpoints, which hold experts and not slots: plain files, or directories of shards (DCP)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

from swiftmoe_lightning.distributed import full_tensor, is_sharded
from swiftmoe_lightning.engine.checkpoint_files import check_file, discard, partial_path, save_whole, sync_folder
from swiftmoe_lightning.engine.safe_reader import SafePlanner, SafeReader
from swiftmoe_lightning.modules import shape_message

META_FILE: Final = "meta.pt"
# The key, in META_FILE, of the SHA-256 of DCP's index, which carries no checksum itself.
_INDEX_SUM: Final = "swiftmoe_metadata_sha256"
_TO_WRITE: Final = (
    "Make room, choose another folder, or leave out what cannot be pickled. (FAQ: checkpoint-not-written)"
)


def full_state(value: Any, keep: bool) -> Any:
    """`value` with every sharded tensor gathered whole, on the CPU. A collective.

    Args:
        value: tensors in dicts, lists and tuples.
        keep: False replaces each gathered tensor by None, so that only the rank that writes has all of them in
            memory.
    """
    if isinstance(value, dict):
        return type(value)((k, full_state(v, keep)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(full_state(v, keep) for v in value)
    if isinstance(value, Tensor) and is_sharded(value):
        full = full_tensor(value)
        return full.cpu() if keep else None
    return value


def is_checkpoint_directory(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a directory, finished or not, as `save_directory` writes."""
    return Path(path).is_dir()


def save_file(write: Callable[..., None], state: dict[str, Any], path: str | os.PathLike[str], *rest: Any) -> None:
    """Write a plain file on rank 0, by `write(state, path, *rest)`. A collective.

    Raises:
        OSError: when it cannot be written, on all ranks.
    """
    try:
        _on_rank_zero(lambda: write(state, path, *rest))
    except OSError as error:
        raise OSError(f"cannot write the checkpoint {str(path)!r} ({error}). {_TO_WRITE}") from error


def save_directory(
    path: str | os.PathLike[str], module: nn.Module, optimizers: list[Optimizer], meta: dict[str, Any]
) -> None:
    """Write a DCP directory, each rank its own shards, with `meta` in it. A collective.

    A new directory is written beside `path`, and renamed to `path` once it is complete. An older one at `path` is first
    renamed to "<name>-previous", which `ckpt_path="last"` finds, too, and then removed. So whenever the run is killed,
    there is a complete one.

    Args:
        path: of the directory.
        module: saved under "model", where Lightning's `consolidate_checkpoint` looks for it.
        optimizers: the i-th is saved under "optimizer_i", by parameter name.
        meta: plain types and tensors.

    Raises:
        OSError: when it cannot be written, on all ranks; an older directory at `path` is kept.
    """
    target = Path(path)
    partial, previous = partial_path(target), target.with_name(f"{target.stem}-previous{target.suffix}")
    try:
        _on_rank_zero(lambda: _prepare(target, partial, previous))
        state: dict[str, Any] = {"model": get_model_state_dict(module)}
        for i, optimizer in enumerate(optimizers):
            state[f"optimizer_{i}"] = get_optimizer_state_dict(module, optimizer)
        dcp.save(state, checkpoint_id=partial)
        _on_rank_zero(lambda: _finish(meta, target, partial, previous))
    except (CheckpointException, OSError) as error:
        # On rank 0 only: when a slower rank comes to this line, the next save may have made its partial folder already.
        _on_rank_zero(lambda: discard(partial))
        raise OSError(
            f"cannot write the checkpoint {str(path)!r} ({causes_of(error)}). Nothing of it is left, and one that was "
            f"there still is. {_TO_WRITE}"
        ) from error


def _prepare(target: Path, partial: Path, previous: Path) -> None:
    discard(partial)
    if previous.exists() and not target.exists():
        # An earlier run was killed between the two renames of `_finish`.
        os.rename(previous, target)
    partial.mkdir(parents=True)


def _finish(meta: dict[str, Any], target: Path, partial: Path, previous: Path) -> None:
    seal_directory(partial, meta)
    discard(previous)
    if target.is_dir() and not target.is_symlink():
        os.rename(target, previous)
    else:
        target.unlink(missing_ok=True)
    os.rename(partial, target)
    sync_folder(target.parent)
    discard(previous)


def seal_directory(path: Path, meta: dict[str, Any]) -> None:
    """Write `meta` into a directory that DCP has written, and the checksum of DCP's index."""
    save_whole({**meta, _INDEX_SUM: index_sum(path)}, path / META_FILE)


def _on_rank_zero(action: Callable[[], None]) -> None:
    """Run `action` on rank 0. If it raises, all ranks raise an OSError. A collective."""
    messages: list[str | None] = [None]
    cause: Exception | None = None
    is_distributed = dist.is_available() and dist.is_initialized()
    if not is_distributed or dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            cause, messages = error, [f"rank 0: {type(error).__name__}: {error}"]
    if is_distributed:
        dist.broadcast_object_list(messages, src=0)
    if messages[0] is not None:
        raise OSError(messages[0]) from cause


def causes_of(error: BaseException) -> str:
    """The errors of the ranks that failed in DCP; the message of any other error."""
    failures = getattr(error, "failures", None) or {}
    return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in failures.items()) or str(error)


def index_sum(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a directory's DCP index, in hex."""
    with (Path(path) / ".metadata").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expected_index_sum(path: str | os.PathLike[str]) -> str | None:
    """The SHA-256 of the index when the directory was saved; None if it was not recorded."""
    index_hash: str | None = torch.load(Path(path) / META_FILE, map_location="cpu", weights_only=True).get(_INDEX_SUM)
    return index_hash


def read_file(path: str | os.PathLike[str]) -> Any:
    """Load what `torch.save` wrote (plain types and tensors), on the CPU.

    Raises:
        ValueError: for a file that cannot be read or is damaged, naming the record.
    """
    with reading(path):
        check_file(Path(path))
        return torch.load(path, map_location="cpu", weights_only=True)


def load_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the `meta` of a directory.

    Raises:
        ValueError: when the directory is unfinished, or its `meta` or DCP's index is damaged.
    """
    file = Path(path) / META_FILE
    with reading(path):
        if not file.is_file():
            raise ValueError(
                f"the directory lacks {META_FILE}, which is written last: the run that saved it was stopped before it "
                "had finished"
            )
        check_file(file)
        meta: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        # Directories of early versions have no checksum.
        if meta.pop(_INDEX_SUM, None) not in (None, index_sum(path)):
            raise ValueError(f".metadata is damaged: its SHA-256 is not the one in {META_FILE}")
    return meta


def load_model(path: str | os.PathLike[str], module: nn.Module) -> None:
    """Read the model of a directory, written at any world size. A collective.

    Raises:
        ValueError: when a shape differs, naming the key, or the directory cannot be read.
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
    """Read the optimizers of a directory, written at any world size. A collective.

    Raises:
        ValueError: when the directory cannot be read.
    """
    for i, optimizer in enumerate(optimizers):
        state = {f"optimizer_{i}": get_optimizer_state_dict(module, optimizer)}
        _load(path, state)
        set_optimizer_state_dict(module, optimizer, state[f"optimizer_{i}"])


def _load(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    try:
        dcp.load(state, storage_reader=SafeReader(path), planner=SafePlanner())
    except CheckpointException as error:
        raise ValueError(unreadable(path, causes_of(error))) from error


def _read_metadata(path: str | os.PathLike[str]) -> Metadata:
    with reading(path):
        return SafeReader(path).read_metadata()


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what is raised inside into a ValueError that names the checkpoint and says what to do.

    Raises:
        ValueError: in place of any other exception.
    """
    try:
        yield
    # A damaged pickle can raise any exception.
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(unreadable(path, f"{kind}{error}")) from error


def unreadable(path: str | os.PathLike[str], reason: str) -> str:
    """The error message for a checkpoint that cannot be read for this `reason`."""
    return (
        f"cannot read the checkpoint {str(path)!r} ({reason}). It may be missing, cut off or corrupt, or hold objects "
        "that need Trainer.fit(..., weights_only=False): check the path, or use an older one. "
        "(FAQ: checkpoint-not-read)"
    )
