"""Writes files so that they are complete or absent, and checks that they hold what was written."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

ZIP_START: Final = b"PK\x03\x04"
_CHUNK: Final = 1 << 20


def partial_path(path: Path) -> Path:
    """The path at which the checkpoint `path` is written before it is renamed to `path`.

    Lightning takes any name that ends in ".ckpt", and on SLURM any with "ckpt_" in it, for a checkpoint: this one has
    neither.
    """
    return path.with_name(f"{path.name.replace('ckpt_', 'ckpt-')}.partial")


def discard(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk, where the system can (Windows and some network file systems cannot)."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_whole(value: Any, path: Path) -> None:
    """`torch.save` to a partial file, which is renamed to `path` once it is complete and on disk.

    So a kill leaves an older file as it was. No partial file is left after an error; errors of pickling are passed on.

    Raises:
        OSError: when it cannot be written.
    """
    partial = partial_path(path)
    discard(partial)
    try:
        # Opened by its name, not by mkstemp, so that permissions are those of any new file.
        with partial.open("xb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        discard(partial)
        # On a full disk torch's writer raises a RuntimeError about its position, in place of the OSError.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    sync_folder(path.parent)


def check_records(stream: BinaryIO, name: str) -> bool:
    """Compare the records of a file of `torch.save` with their CRC32s, which torch's own reader does not check.

    Args:
        stream: of the whole file, at any position.
        name: what to call the file in errors.

    Returns:
        Whether there were any CRC32s. torch's legacy format has none, nor do files have any that are saved after
        `torch.serialization.set_crc32_options(False)`.

    Raises:
        ValueError: for a damaged record, naming it.
    """
    stream.seek(0)
    if stream.read(len(ZIP_START)) != ZIP_START:
        return False
    part, has_sums = "list of records", False
    try:
        with zipfile.ZipFile(stream) as archive:
            for record in archive.infolist():
                part = f"record {record.filename!r}"
                # A record that was saved without a CRC has 0 there.
                if record.CRC or not record.file_size:
                    has_sums |= bool(record.CRC)
                    with archive.open(record) as content:
                        while content.read(_CHUNK):
                            pass
    # Damaged bytes can raise any exception.
    except Exception as error:
        raise ValueError(f"{name} is damaged: its {part} does not hold what was written ({error})") from error
    return has_sums


def check_file(path: Path) -> bool:
    """`check_records` of a file."""
    with path.open("rb") as stream:
        return check_records(stream, path.name)


class FileSlice(io.RawIOBase):
    """`length` bytes of `file` from `offset` on, as a file of their own."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._position = file, offset, length, 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position, in bytes from the slice's start."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move by `offset` bytes from the slice's start, the position or the slice's end. Returns the new position."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the slice reaches. Returns how many bytes were read."""
        self._file.seek(self._offset + self._position)
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        # `file` is a buffered file, which has readinto.
        read: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += read
        return read
