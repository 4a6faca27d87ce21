"""Reads files of token counts into a `Trace`. U steps, W ranks, L layers, E experts."""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib.format import MAGIC_PREFIX, read_array_header_1_0, read_array_header_2_0

from swiftmoe_lightning.analysis.megatron import FILES_OF_A_FOLDER, read_megatron
from swiftmoe_lightning.analysis.trace import RECORDED_AXES, Trace, check_bytes
from swiftmoe_lightning.analysis.write_trace import (
    FORMAT_VERSION,
    METADATA_KEY,
    SHAPE_KEY,
    import_parquet,
    parquet_schema,
)

_READABLE: Final = (
    "an .npz or .parquet file of PlacementRecorder, an .npz file with an array `counts`, or Megatron's "
    f"{FILES_OF_A_FOLDER} or their folder"
)
# More than any trace needs. A file that claims more is refused before memory is allocated.
_MOST_ROWS: Final = 2**27
_HEADERS: Final = {(1, 0): read_array_header_1_0, (2, 0): read_array_header_2_0}
# What zipfile, zlib and numpy raise for damaged archives; RuntimeError is one that zipfile has no method for.
_DAMAGE: Final = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, MemoryError)


def read_trace(path: str | Path) -> Trace:
    """The trace in a file, whose kind is told by its first bytes.

    .npz: `counts` [steps, layers, experts] or [steps, ranks, layers, experts]; and, where they are there, `step`,
        `metadata` (a JSON object, its `layers` naming the layers), and the arrays of `Trace.recorded`. Others are
        ignored. This is what `PlacementRecorder` writes. Nothing is ever unpickled.
    .parquet: what `PlacementRecorder` writes. It has no recorded arrays.
    .jsonl: what Megatron-Core writes for `--moe-routing-trace-path`, one rank's file, or the folder with all ranks'
        (see `read_megatron`).

    Args:
        path: the file, or Megatron's folder. Where Megatron's files do not say how many experts there are, the highest
            one that was chosen is taken for the last: `read_megatron` can be told their number.

    Raises:
        FileNotFoundError: where there is nothing.
        ImportError: for Parquet without pyarrow.
        ValueError: one line with the path, for all that is not a trace.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}. Give {_READABLE}.")
    with _naming(path):
        return _read(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        # Names in a damaged file may have line breaks.
        raise ValueError(f"{path}: {' '.join(str(error).splitlines())}") from error


def _read(path: Path) -> Trace:
    if path.is_dir():
        if files := sorted(path.glob(FILES_OF_A_FOLDER)):
            return read_megatron(files)
        raise ValueError(f"it is a folder without {FILES_OF_A_FOLDER}. Give {_READABLE}.")
    if not path.is_file():
        # Reading a pipe or a device may never end.
        raise ValueError(f"it is no regular file, but a pipe, socket or device. Give {_READABLE}.")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError("the file is empty. Record the run again, to its end.")
    if start.startswith(b"PK"):
        return _read_npz(path)
    if start.startswith(b"PAR1"):
        return _read_parquet(path)
    if path.suffix.lower() == ".jsonl" or start.lstrip().startswith(b"{"):
        return read_megatron([path])
    raise ValueError(f"it is no trace: its first bytes are {start[:4]!r}. Give {_READABLE}.")


def _read_npz(path: Path) -> Trace:
    with path.open("rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                return _trace_of(archive)
        except _DAMAGE as error:
            raise ValueError(f"the archive is cut off or damaged ({error!r}). Copy or record it again.") from error


def _trace_of(archive: Any) -> Trace:
    if "counts" not in archive.files:
        raise ValueError(
            f"it must hold an array `counts`, got {', '.join(archive.files) or 'none'}. Save the assignments "
            "[steps, layers, experts] under that name."
        )
    counts = _member(archive, "counts")
    if counts.ndim not in (3, 4):
        raise ValueError(
            "`counts` must be [steps, layers, experts] or [steps, ranks, layers, experts], got shape "
            f"{counts.shape}. Save it with those axes."
        )
    counts_UWLE = counts[:, None] if counts.ndim == 3 else counts
    options: dict[str, Any] = {}
    if "step" in archive.files:
        options["step_U"] = _member(archive, "step")
    if "metadata" in archive.files:
        options["metadata"] = _metadata(str(_member(archive, "metadata")))
        options["layers"] = options["metadata"].get("layers", ())
    recorded = {name: _member(archive, name) for name in RECORDED_AXES if name in archive.files}
    return Trace(counts_UWLE, recorded=recorded, **options)


def _member(archive: Any, name: str) -> np.ndarray:
    _check_claim(archive.zip, name)
    try:
        # An entry that is not numpy's comes as bytes.
        return np.asarray(archive[name])
    except ValueError as error:
        raise ValueError(
            f"`{name}` cannot be read, as objects are never unpickled ({error!r}). Save it as an int64 array."
        ) from error


def _check_claim(archive: zipfile.ZipFile, name: str) -> None:
    """Refuse an entry that is too large, or whose header claims more than the entry holds: numpy would ask for it all.

    Raises ValueError.
    """
    entry = next(entry for entry in archive.infolist() if entry.filename in (name, f"{name}.npy"))
    check_bytes(f"`{name}`", entry.file_size)
    with archive.open(entry) as file:
        if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:
            return
        version = tuple(file.read(2))
        if version not in _HEADERS:
            raise ValueError(f"`{name}` has numpy's format {version}, which no trace needs. Save it as an int64 array.")
        shape, _, dtype = _HEADERS[version](file)
    claimed = math.prod(shape) * dtype.itemsize
    if claimed > entry.file_size:
        raise ValueError(
            f"`{name}` claims the shape {shape} of {dtype}, {claimed} bytes, and has {entry.file_size}. Copy or record "
            "it again."
        )


def _metadata(text: str | bytes) -> dict[str, Any]:
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"`metadata` must be a JSON object, got {text[:40]!r}. Leave it out, or record the run again.")
    version, layers = metadata.get("format_version", FORMAT_VERSION), metadata.get("layers", [])
    if version != FORMAT_VERSION:
        raise ValueError(
            f"its format_version is {version!r}, and this package reads {FORMAT_VERSION}. Update swiftmoe-lightning."
        )
    if not isinstance(layers, list) or not all(isinstance(name, str) for name in layers):
        raise ValueError(f"`layers` of its metadata must be a list of names, got {str(layers)[:40]}. Leave it out.")
    return metadata


def _read_parquet(path: Path) -> Trace:
    pa, pq = import_parquet()
    try:
        # Not `read_table`: it turns folders of the path like layer=3/ into columns.
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, metadata_of_schema = file.schema_arrow, file.schema_arrow.metadata or {}
            needed = parquet_schema(pa)
            if file.metadata.num_rows > _MOST_ROWS:
                raise ValueError(
                    f"it claims {file.metadata.num_rows} rows, and at most {_MOST_ROWS} are read. Record fewer steps."
                )
            if not schema.equals(needed):
                raise ValueError(
                    f"its columns must be {_columns(needed)}, got {_columns(schema)}. Record the run again."
                )
            columns = {name: column.to_numpy() for name, column in zip(schema.names, file.read().columns, strict=True)}
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the file is cut off or damaged ({error!r}). Copy or record it again.") from error
    metadata = _metadata(metadata_of_schema.get(METADATA_KEY, b""))
    step_U, row = np.unique(columns["step"], return_inverse=True)
    shape = _shape(metadata_of_schema.get(SHAPE_KEY, b""), len(step_U))
    ids = (row, columns["rank"], columns["layer"], columns["expert"])
    for name, values, size in zip(("rank", "layer", "expert"), ids[1:], shape[1:], strict=True):
        if len(values) and not 0 <= values.min() <= values.max() < size:
            raise ValueError(
                f"its {name}s must be numbers 0..{size - 1}, got {values.min()}..{values.max()}. Record the run again."
            )
    counts_UWLE = np.zeros(shape, dtype=np.int64)
    np.add.at(counts_UWLE, ids, columns["count"])
    return Trace(counts_UWLE, metadata.get("layers", ()), step_U, metadata)


def _columns(schema: Any) -> str:
    return ", ".join(f"{field.name} {field.type}{'' if not field.nullable else ' or null'}" for field in schema)


def _shape(text: bytes, num_steps: int) -> tuple[int, ...]:
    try:
        shape = json.loads(text)
    except ValueError:
        shape = None
    if not (isinstance(shape, list) and len(shape) == 4 and all(type(size) is int and size >= 0 for size in shape)):
        raise ValueError(f"its {SHAPE_KEY.decode()} must be four sizes, got {text[:40]!r}. Record the run again.")
    if shape[0] != num_steps:
        raise ValueError(f"it must have rows of {shape[0]} steps, got {num_steps}. Record the run again.")
    check_bytes(f"counts of the shape {shape}", 8 * math.prod(shape))
    return tuple(shape)
