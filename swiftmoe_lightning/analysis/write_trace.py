"""A recording as a file: .npz with all of it, or Parquet with the counts. U steps, W ranks, L layers, E experts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

FORMAT_VERSION: Final = 1
# Keys of the Parquet schema's metadata; both values are JSON.
METADATA_KEY: Final = b"swiftmoe.metadata"
SHAPE_KEY: Final = b"swiftmoe.shape"

TraceWriter = Callable[[Path, Mapping[str, np.ndarray], Mapping[str, Any]], None]


def writer_for(path: Path) -> TraceWriter:
    """`write_parquet` for a path that ends in .parquet, `write_npz` for any other.

    Raises:
        ImportError: when Parquet is asked for and pyarrow is not installed.
    """
    if path.suffix.lower() != ".parquet":
        return write_npz
    import_parquet()
    return write_parquet


def check_writable(path: Path) -> None:
    """Make sure that `path` can become a file: now, not at the end of a run. Writes nothing.

    Raises:
        OSError: with the reason, if it cannot.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, and a file is to be written. Name a file in it.")
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written, as {folder} is a file. Name another folder.")
    target = path if path.exists() else folder
    if not os.access(target, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {target} is read-only. Name another folder.")


def partial_file(path: Path) -> Path:
    """Where a recording is written before it takes the place of `path`: a file beside it, and so on the same disk.

    Args:
        path: of the recording. A link stays one, to the same file.
    """
    path = path.resolve()
    return path.with_name(f"{path.name}.partial")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file to write to, which then takes the place of `path` at once: readers find the old or the new one, whole."""
    partial = partial_file(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path.resolve())
    finally:
        partial.unlink(missing_ok=True)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """All arrays, and `metadata` as an array of its own, a JSON string. The file's folder is made.

    Args:
        path: the file, whatever it ends in. Whoever reads it meanwhile finds the old file or the new one, whole.
        arrays: name -> array.
        metadata: JSON-able.
    """
    # Numpy adds .npz to a name that ends otherwise, but not to an open file.
    with _replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays, metadata=np.array(json.dumps(metadata)))  # type: ignore[arg-type]


def write_parquet(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """`counts` [U, W, L, E] as one long table; its other arrays, `step` excepted, are left out.

    Columns are step (int64, the training step), layer, rank, expert (int32, numbered from 0) and count (int64). Rows
    with count 0 are left out, but for one in a step that has no others. The schema's metadata holds `metadata` under
    "swiftmoe.metadata" and [U, W, L, E] under "swiftmoe.shape", as JSON. The file's folder is made.

    Args:
        path: the file. Whoever reads it meanwhile finds the old file or the new one, whole.
        arrays: `counts`, and `step` [U].
        metadata: JSON-able.

    Raises:
        ImportError: when pyarrow is not installed.
    """
    pa, pq = import_parquet()
    counts_UWLE = arrays["counts"]
    is_row_UWLE = counts_UWLE != 0
    # A step without tokens gets one row with count 0, so that it is not lost.
    is_row_UWLE[:, 0, 0, 0] |= ~is_row_UWLE.any((1, 2, 3))
    row, rank, layer, expert = np.nonzero(is_row_UWLE)
    ids = {"layer": layer, "rank": rank, "expert": expert}
    columns = {
        "step": arrays["step"][row],
        **{name: values.astype(np.int32) for name, values in ids.items()},
        "count": counts_UWLE[is_row_UWLE],
    }
    metadata_of_schema = {METADATA_KEY: json.dumps(metadata), SHAPE_KEY: json.dumps(counts_UWLE.shape)}
    table = pa.table(columns, schema=parquet_schema(pa).with_metadata(metadata_of_schema))
    # With checksums, a damaged file is an error and not a file of other counts.
    with _replacing(path) as partial:
        pq.write_table(table, partial, compression="zstd", write_page_checksum=True)


def parquet_schema(pa: Any) -> Any:
    """The table's columns, none of which is nullable.

    Args:
        pa: the pyarrow module.
    """
    types = {"step": pa.int64(), "layer": pa.int32(), "rank": pa.int32(), "expert": pa.int32(), "count": pa.int64()}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def import_parquet() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        ImportError: when pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        raise ImportError(
            'Parquet files need pyarrow. Run `pip install "swiftmoe-lightning[parquet]"`, or use an .npz file.'
        ) from missing
    return pyarrow, pyarrow.parquet
