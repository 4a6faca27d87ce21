from __future__ import annotations

import json
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.analysis import Trace, read_trace, writer_for
from swiftmoe_lightning.analysis.write_trace import write_npz, write_parquet
from tests.analysis.cases import COUNTS, METADATA, recording, recordings

WRITERS = {"npz": write_npz, "parquet": write_parquet}


def refusal(path: Path) -> str:
    """The one line that says why it cannot be read, without the path that it begins with."""
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        read_trace(path)
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


def outcome(path: Path) -> Trace | str:
    """The trace, or why there is none."""
    try:
        return read_trace(path)
    except ValueError as refused:
        return str(refused)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_recording_is_read_as_it_was_written(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new" / f"trace.{kind}"
    WRITERS[kind](path, recording(), METADATA)
    trace = read_trace(str(path))
    np.testing.assert_array_equal(trace.counts_UWLE, COUNTS)
    assert trace.layers == ("moe.experts",)
    assert trace.step_U.tolist() == [3, 4]
    assert trace.metadata == METADATA
    recorded = {name: values.tolist() for name, values in trace.recorded.items()}
    kept = {name: values.tolist() for name, values in recording().items() if name not in ("counts", "step")}
    assert recorded == (kept if kind == "npz" else {})


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=40, deadline=None)
@given(written=recordings())
def test_any_recording_comes_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, kind: str, written: tuple[dict[str, np.ndarray], dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"any.{kind}"
    arrays, metadata = written
    WRITERS[kind](path, arrays, metadata)
    trace = read_trace(path)
    assert trace.counts_UWLE.dtype == np.int64
    np.testing.assert_array_equal(trace.counts_UWLE, arrays["counts"])
    np.testing.assert_array_equal(trace.step_U, arrays["step"])
    assert list(trace.layers) == metadata["layers"]
    assert trace.metadata == metadata


@pytest.mark.parametrize("kind", WRITERS)
# The same examples always: a footer has no checksum, so that one change in a million makes it another table's.
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_damaged_file_is_read_right_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / f"damaged.{kind}"
    WRITERS[kind](path, recording(), METADATA)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[position:]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    result = outcome(path)
    if isinstance(result, str):
        assert result.startswith(f"{path}: ")
        assert "\n" not in result
    else:
        np.testing.assert_array_equal(result.counts_UWLE, COUNTS)


def test_an_npz_file_needs_nothing_but_counts(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", counts=np.array([[[3.0, 1.0]], [[0.0, 2.0]]]), loss=np.array([2.5, None]))
    trace = read_trace(tmp_path / "own.npz")
    assert trace.counts_UWLE.tolist() == [[[[3, 1]]], [[[0, 2]]]]
    assert trace.layers == ("0",)
    assert trace.step_U.tolist() == [0, 1]
    assert trace.metadata == trace.recorded == {}


def test_content_tells_what_a_file_is_not_its_name(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.parquet.old", recording(), METADATA)
    write_parquet(tmp_path / "b.npz", recording(), METADATA)
    for name in ("a.parquet.old", "b.npz"):
        np.testing.assert_array_equal(read_trace(tmp_path / name).counts_UWLE, COUNTS)


def test_a_path_chooses_the_writer() -> None:
    assert writer_for(Path("folder/trace.parquet")) is writer_for(Path("TRACE.PARQUET")) is write_parquet
    assert writer_for(Path("trace.npz")) is writer_for(Path("trace")) is writer_for(Path("a.parquet/b")) is write_npz


def test_where_there_is_nothing_the_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"there is no file {tmp_path}/no.npz. Give an .npz or")):
        read_trace(tmp_path / "no.npz")


def test_a_folder_without_a_trace_is_refused(tmp_path: Path) -> None:
    write_npz(tmp_path / "trace.npz", recording(), METADATA)
    assert "it is a folder without router_trace_rank*.jsonl. Give an .npz" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trace.npz", b"", "the file is empty. Record the run again, to its end."),
        ("trace.parquet", b"", "the file is empty."),
        ("trace.jsonl", b"", "the file is empty."),
        ("trace.csv", b"step,layer\n", "it is no trace: its first bytes are b'step'. Give an .npz or .parquet file"),
        ("trace.npz", b"\x80\x04K\x01.", "it is no trace: its first bytes are b'\\x80\\x04K\\x01'. Give"),
        ("trace.parquet", b"no table", "it is no trace: its first bytes are b'no t'. Give"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"loads": COUNTS},
            "it must hold an array `counts`, got loads. Save the assignments [steps, layers, experts]",
        ),
        ({}, "it must hold an array `counts`, got none."),
        ({"co\nunts": COUNTS}, "it must hold an array `counts`, got co unts."),
        ({"counts": COUNTS[0, 0]}, "`counts` must be [steps, layers, experts] or [steps, ranks, layers, experts], got"),
        ({"counts": COUNTS / 4}, "counts must be whole numbers of 0 or more, got 0.5 at [0, 0, 0, 2]."),
        ({"counts": COUNTS * 0}, "counts of shape (2, 2, 1, 3) are all 0"),
        (
            {"counts": np.array([{}, None])},
            "`counts` cannot be read, as objects are never unpickled (ValueError('Object",
        ),
        ({"counts": COUNTS, "moved": np.array([None])}, "`moved` cannot be read, as objects are never unpickled"),
        ({"counts": COUNTS, "moved": np.zeros((1, 1))}, "moved must have the axes [steps = 2, layers = 1] to fit"),
        ({"counts": COUNTS, "step": np.arange(3)}, "step must hold one number for each of the 2 steps of counts"),
        (
            {"counts": COUNTS, "metadata": "layers: 2"},
            "`metadata` must be a JSON object, got 'layers: 2'. Leave it out",
        ),
        ({"counts": COUNTS, "metadata": "[1]"}, "`metadata` must be a JSON object, got '[1]'."),
        ({"counts": COUNTS, "metadata": '{"layers": 1}'}, "`layers` of its metadata must be a list of names, got 1."),
        ({"counts": COUNTS, "metadata": '{"layers": ["a", "b"]}'}, "layers must name the 1 layers of counts, got 2"),
        ({"counts": COUNTS, "metadata": '{"format_version": 2}'}, "its format_version is 2, and this package reads 1."),
    ],
)
def test_an_npz_file_that_is_no_trace_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "trace.npz", **arrays)
    assert message in refusal(tmp_path / "trace.npz")


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    write_npz(path, recording(), METADATA)
    path.write_bytes(path.read_bytes()[:-40])
    assert (
        "the archive is cut off or damaged (BadZipFile('File is not a zip file')). Copy or record it again."
        in refusal(path)
    )


def test_an_archive_without_numpys_files_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "trace.npz", "w") as archive:
        archive.writestr("counts", b"1 2 3")
    assert "`counts` must be [steps, layers, experts]" in refusal(tmp_path / "trace.npz")


def test_parquet_is_a_long_table_without_zeros(tmp_path: Path) -> None:
    write_parquet(tmp_path / "trace.parquet", recording(), METADATA)
    table = pq.read_table(tmp_path / "trace.parquet")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("step", "int64"),
        ("layer", "int32"),
        ("rank", "int32"),
        ("expert", "int32"),
        ("count", "int64"),
    ]
    # The step without tokens has a row of its own.
    rows = [[3, 0, 0, 0, 4], [3, 0, 0, 2, 2], [3, 0, 1, 0, 1], [3, 0, 1, 2, 5], [4, 0, 0, 0, 0]]
    assert [list(row.values()) for row in table.to_pylist()] == rows
    assert json.loads(table.schema.metadata[b"swiftmoe.metadata"]) == METADATA
    assert json.loads(table.schema.metadata[b"swiftmoe.shape"]) == [2, 2, 1, 3]


def test_folders_on_the_way_add_no_columns(tmp_path: Path) -> None:
    path = tmp_path / "layer=7" / "seed=1" / "trace.parquet"
    write_parquet(path, recording(), METADATA)
    np.testing.assert_array_equal(read_trace(path).counts_UWLE, COUNTS)


def rewrite(path: Path, change: Any) -> None:
    write_parquet(path, recording(), METADATA)
    pq.write_table(change(pq.read_table(path)), path)


def with_first(table: pa.Table, name: str, value: int | None) -> pa.Table:
    index = table.schema.get_field_index(name)
    column = pa.array([value, *table[name].to_pylist()[1:]], table.schema.field(name).type)
    field = table.schema.field(name).with_nullable(value is None)
    return table.set_column(index, field, column)


def with_shape(table: pa.Table, shape: str) -> pa.Table:
    return table.replace_schema_metadata({**table.schema.metadata, b"swiftmoe.shape": shape})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.drop_columns("rank"),
            "its columns must be step int64, layer int32, rank int32, expert int32, count",
        ),
        (
            lambda t: with_first(t, "count", None),
            "got step int64, layer int32, rank int32, expert int32, count int64 or",
        ),
        (lambda t: t.replace_schema_metadata(None), "`metadata` must be a JSON object, got b''."),
        (lambda t: with_shape(t, "[2, 2, 1]"), "its swiftmoe.shape must be four sizes, got b'[2, 2, 1]'. Record"),
        (lambda t: with_shape(t, "[2, 2, 1, -3]"), "its swiftmoe.shape must be four sizes"),
        (lambda t: with_shape(t, "[3, 2, 1, 3]"), "it must have rows of 3 steps, got 2. Record"),
        (lambda t: with_shape(t, "[2, 2, 2, 3]"), "layers must name the 2 layers of counts, got 1 names."),
        (lambda t: with_first(t, "rank", 2), "its ranks must be numbers 0..1, got 0..2. Record"),
        (lambda t: with_first(t, "expert", -1), "its experts must be numbers 0..2, got -1..2."),
        (lambda t: with_first(t, "count", -5), "counts must be whole numbers of 0 or more, got -5 at [0, 0, 0, 0]."),
        (lambda t: t.slice(0, 0), "it must have rows of 2 steps, got 0."),
        (lambda t: with_shape(t.slice(0, 0), "[0, 2, 1, 3]"), "counts must hold at least one step"),
    ],
)
def test_a_table_that_is_no_trace_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    rewrite(tmp_path / "trace.parquet", change)
    assert message in refusal(tmp_path / "trace.parquet")


def test_a_truncated_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.parquet"
    write_parquet(path, recording(), METADATA)
    path.write_bytes(path.read_bytes()[:-40])
    assert re.match(r"the file is cut off or damaged \(.+\)\. Copy or record it again\.", refusal(path))


def test_without_pyarrow_parquet_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.parquet"
    write_parquet(path, recording(), METADATA)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for use in (lambda: read_trace(path), lambda: write_parquet(path, recording(), METADATA), lambda: writer_for(path)):
        with pytest.raises(ImportError, match=re.escape('pip install "swiftmoe-lightning[parquet]"')):
            use()
    write_npz(tmp_path / "trace.npz", recording(), METADATA)
    assert read_trace(tmp_path / "trace.npz").num_experts == 3
