"""How both of Lightning's strategies write and read plain checkpoint files, unless the user brings a plugin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from typing_extensions import override

from swiftmoe_lightning.engine.checkpoint import reading
from swiftmoe_lightning.engine.checkpoint_files import check_file, save_whole


class WholeFileIO(TorchCheckpointIO):
    """Writes local files whole or not at all, and refuses damaged ones. Remote files are left to Lightning."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole file or nothing.

        Raises:
            OSError: when it cannot be written. An earlier file of the name stays, and nothing is left of the new one.
        """
        file = _local(path)
        if file is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        save_whole(checkpoint, file)

    @override
    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Check a local file, then read it.

        Raises:
            FileNotFoundError: when nothing is there.
            ValueError: when it is damaged, naming the record, or no checkpoint file.
        """
        file = _local(path)
        if not get_filesystem(path).exists(path):
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        with reading(path):
            if file is not None:
                check_file(file)
            return super().load_checkpoint(path, *args, **kwargs)


class WholeFileMixin:
    """For strategies of Lightning: makes `WholeFileIO` the default `checkpoint_io`, also inside a wrapping plugin."""

    _checkpoint_io: CheckpointIO | None

    @property
    def checkpoint_io(self) -> CheckpointIO:
        """What writes and reads checkpoint files: the user's plugin, or `WholeFileIO`."""
        if self._checkpoint_io is None:
            self._checkpoint_io = WholeFileIO()
        elif isinstance(self._checkpoint_io, _WrappingCheckpointIO):
            # The setter of a wrapper does nothing where the wrapper has an inner plugin already.
            self._checkpoint_io.checkpoint_io = WholeFileIO()
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io


def _local(path: Any) -> Path | None:
    """Where `path` is on this machine; None for another protocol."""
    filesystem, name = url_to_fs(str(path))
    return Path(name) if isinstance(filesystem, LocalFileSystem) else None
