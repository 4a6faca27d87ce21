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

from swiftmoe_lightning.engine.checkpoint_files import ZIP_START, FileSlice, check_records

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
    """DCP's reader of a directory that runs nothing and checks what it reads.

    Its `.metadata` may hold DCP's own classes alone, and its shards must be what was written.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """DCP's index.

        Raises:
            UnpicklingError: when it holds anything else, naming that.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its .metadata holds a {type(metadata).__name__}")
        meta = metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what `plan` asks of this rank.

        Raises:
            ValueError: when any of it is damaged, naming file and record.
        """
        for item in plan.items:
            # Each item is read right after its check, while the file's pages are still in memory.
            check_slice(self.path, item.storage_index.fqn, self.storage_data[item.storage_index])
            super().read_data(replace(plan, items=[item]), planner).wait()
        done: Future[None] = Future()
        done.set_result(None)
        return done


def check_slice(folder: str | os.PathLike[str], name: str, place: Any) -> bool:
    """`check_records` of one tensor or value.

    Args:
        folder: the directory.
        name: of the tensor or value, for errors.
        place: where it lies, as DCP's index says.

    Raises:
        ValueError: as `check_records` does, and when no file of `torch.save` begins there.
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
        """Take in one value.

        Raises:
            UnpicklingError: for anything that is not plain.
        """
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
