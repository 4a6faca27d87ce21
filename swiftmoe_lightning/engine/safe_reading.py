"""Reading of DCP directories that executes nothing: torch itself unpickles whatever their files ask for."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from swiftmoe_lightning.engine.files import FileSlice, check_records

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
            self._check(item)
            super().read_data(replace(plan, items=[item]), planner).wait()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _check(self, item: ReadItem) -> None:
        stored = self.storage_data[item.storage_index]
        with Path(self.path, stored.relative_path).open("rb") as file:
            whole = io.BufferedReader(FileSlice(file, stored.offset, stored.length))
            check_records(whole, f"{item.storage_index.fqn!r} in {stored.relative_path}")


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, whose values that are not tensors are plain ones."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Raises UnpicklingError for anything else."""
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
