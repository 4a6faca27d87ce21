"""Checks every file of a checkpoint against the checksums that it carries, for `swiftmoe doctor CHECKPOINT`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from swiftmoe_lightning.engine.checkpoint import META_FILE, expected_index_sum, index_sum
from swiftmoe_lightning.engine.checkpoint_files import ZIP_START, check_file
from swiftmoe_lightning.engine.safe_reader import SafeReader, check_slice

_INDEX: Final = ".metadata"
# Suffixes that Lightning, Accelerate and transformers use with `torch.save`, and the two starts of such files.
_TORCH_SUFFIXES: Final = (".ckpt", ".pt", ".pth", ".bin")
_TORCH_STARTS: Final = (ZIP_START, b"\x80\x02\x8a\x0a")


@dataclass(frozen=True)
class Finding:
    """The result of checking one file.

    Attributes:
        path: of the file, or of the folder where there is none.
        size: in bytes; None if it is no file.
        state: "ok", "not verified", "damaged", "unfinished", "missing" or "unreadable".
        why: the reason; empty for "ok".
    """

    path: Path
    size: int | None
    state: str
    why: str = ""

    @property
    def is_bad(self) -> bool:
        """Whether something is wrong with it. Files without checksums are not bad."""
        return self.state not in ("ok", "not verified")


def verify_checkpoint(path: Path) -> Iterator[Finding]:
    """Read every file, and compare it with the checksums that it carries.

    Args:
        path: of a plain file, a directory of `save_directory`, or a folder with any of them.

    Yields:
        One finding for each file.
    """
    if path.is_dir():
        empty = True
        for finding in _folder(path):
            empty = False
            yield finding
        if empty:
            yield Finding(path, None, "missing", "the folder is empty")
    elif path.is_file() or not path.exists():
        yield _file(path)
    else:
        yield Finding(path, None, "unreadable", "it is neither a file nor a folder")


def _folder(folder: Path) -> Iterator[Finding]:
    entries = {entry.name: entry for entry in sorted(folder.iterdir())}
    if META_FILE in entries or _INDEX in entries or any(name.endswith(".distcp") for name in entries):
        yield from _directory(folder, entries)
    for entry in entries.values():
        if entry.name.endswith(".partial"):
            why = "a run was stopped while it saved: delete it, unless that run is still saving"
            yield Finding(entry, _size(entry), "unfinished", why)
        elif entry.is_dir() and entry.is_symlink():
            # A link may lead to a folder that it is in.
            yield Finding(entry, None, "not verified", f"a link to the folder {entry.readlink()}")
        elif entry.is_dir():
            yield from _folder(entry)
        else:
            yield _file(entry)


def _directory(folder: Path, entries: dict[str, Path]) -> Iterator[Finding]:
    """Check a directory of `save_directory`. Removes the files that it checks from `entries`."""
    meta, index = entries.pop(META_FILE, None), entries.pop(_INDEX, None)
    why = "it is written last: the run was stopped while it saved, or another program saved this"
    finding = Finding(folder / META_FILE, None, "unfinished", why) if meta is None else _file(meta)
    yield finding
    if index is None:
        yield Finding(folder / _INDEX, None, "missing", "it says what is where in the shards")
        return
    finding, stored = _index(index, finding.state == "ok")
    yield finding
    slices = defaultdict(list)
    for key, place in stored.items():
        slices[place.relative_path].append((key, place))
    for name, parts in sorted(slices.items()):
        yield _shard(folder, name, parts)
        entries.pop(name, None)


def _index(path: Path, has_sum: bool) -> tuple[Finding, dict[Any, Any]]:
    """Check DCP's index. Returns also where it says each tensor or value lies; nothing if it is bad."""
    try:
        expected = expected_index_sum(path.parent) if has_sum else None
        if expected not in (None, index_sum(path.parent)):
            raise ValueError(f"its SHA-256 is not the one in {META_FILE}")
        stored = SafeReader(path.parent).read_metadata().storage_data
    # A damaged pickle can raise any exception.
    except Exception as error:
        return Finding(path, _size(path), "damaged", f"{type(error).__name__}: {error}"), {}
    if expected is None:
        return Finding(path, _size(path), "not verified", f"no sound {META_FILE} holds its checksum"), stored
    return Finding(path, _size(path), "ok"), stored


def _shard(folder: Path, name: str, parts: list[tuple[Any, Any]]) -> Finding:
    path = folder / name
    if not path.is_file():
        return Finding(path, None, "missing", f"{_INDEX} has {len(parts)} tensors and values in it")
    try:
        has_sums = [check_slice(folder, key.fqn, place) for key, place in parts]
    except (ValueError, OSError) as error:
        return _bad(path, error)
    return Finding(path, _size(path), "ok") if all(has_sums) else _without_sums(path)


def _file(path: Path) -> Finding:
    if not path.exists():
        return Finding(path, None, "missing", "it links to nothing" if path.is_symlink() else "there is no such file")
    if not path.is_file():
        return Finding(path, None, "not verified", "it is neither a file nor a folder")
    if path.suffix in (".safetensors", ".distcp"):
        why = "safetensors carry no checksum" if path.suffix == ".safetensors" else f"no {_INDEX} says what is in it"
        return Finding(path, _size(path), "not verified", why)
    try:
        if check_file(path):
            return Finding(path, _size(path), "ok")
        with path.open("rb") as stream:
            start = stream.read(4)
    except (ValueError, OSError) as error:
        return _bad(path, error)
    if path.suffix in _TORCH_SUFFIXES and start not in _TORCH_STARTS:
        return Finding(path, _size(path), "damaged", "it does not begin as what torch.save writes")
    return _without_sums(path)


def _without_sums(path: Path) -> Finding:
    return Finding(path, _size(path), "not verified", "it carries no checksums")


def _bad(path: Path, error: Exception) -> Finding:
    state = "damaged" if isinstance(error, ValueError) else "unreadable"
    return Finding(path, _size(path), state, str(error).removeprefix(f"{path.name} is damaged: "))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
