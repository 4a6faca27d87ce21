"""Reads DCP directories without running code from them. torch's own reader unpickles without restriction."""

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

# Module -> names that DCP's `.metadata` may refer to.
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
    """DCP's reader of a directory, which runs no code from it and verifies checksums.

    `.metadata` may hold DCP's own classes only, and shards must match the checksums that `torch.save` wrote.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read DCP's index.

        Raises:
            UnpicklingError: when it refers to any other class, which the message names.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"its .metadata holds a {type(metadata).__name__}")
        meta = metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of `plan`.

        Raises:
            ValueError: when any of it is damaged, naming file and record.
        """
        for item in plan.items:
            # Each item is read right after its check, while its pages are in the page cache.
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
        place: its file, offset and length, from DCP's index.

    Raises:
        ValueError: as `check_records` does, and when it does not begin as `torch.save` writes.
    """
    where = f"{name!r} in {place.relative_path}"
    with Path(folder, place.relative_path).open("rb") as file:
        stream = io.BufferedReader(FileSlice(file, place.offset, place.length))
        if stream.read(len(ZIP_START)) != ZIP_START:
            raise ValueError(f"{where} is damaged: it does not begin as what torch.save writes")
        return check_records(stream, where)


class SafePlanner(DefaultLoadPlanner):
    """DCP's planner, which loads values that are not tensors with `weights_only=True`."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load one value.

        Raises:
            UnpicklingError: for a value that is not of plain types.
        """
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)
