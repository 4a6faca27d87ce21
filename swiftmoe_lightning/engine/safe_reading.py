"""Reading of DCP directories that executes nothing: torch itself unpickles whatever their files ask for."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from swiftmoe_lightning.engine.files import ZIP_START, FileSlice, check_records

# Module -> names that DCP's own `.metadata` holds.
_ALLOWED: Final = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"its .metadata asks for {module}.{name}, which no checkpoint needs")
        return super().find_class(module, name)


class SafeReader(FileSystemReader):
    """DCP's reader of a directory, whose `.metadata` may hold DCP's own classes alone, and whose shards must be what
    was written."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises UnpicklingError, naming what else it holds."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its .metadata holds a {type(metadata).__name__}")
        meta = metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Raises ValueError, naming file and record, for what this rank reads and is damaged."""
        for item in plan.items:
            # One by one: what has been checked is then read from memory.
            check_slice(self.path, item.storage_index.fqn, self.storage_data[item.storage_index])
            super().read_data(replace(plan, items=[item]), planner).wait()
        done: Future[None] = Future()
        done.set_result(None)
        return done


def check_slice(folder: str | os.PathLike[str], name: str, place: Any) -> bool:
    """`check_records` of the tensor or value `name`, which lies where DCP's index says (place).

    Raises ValueError, too, where no file of `torch.save` begins.
    """
    where = f"{name!r} in {place.relative_path}"
    with Path(folder, place.relative_path).open("rb") as file:
        whole = io.BufferedReader(FileSlice(file, place.offset, place.length))
        if whole.read(len(ZIP_START)) != ZIP_START:
            raise ValueError(f"{where} is damaged: it does not begin as what torch.save writes")
        return check_records(whole, where)


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, whose values that are not tensors are plain ones."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises UnpicklingError for anything else."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
