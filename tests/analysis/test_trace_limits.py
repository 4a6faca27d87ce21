"""Limits of traces: each is checked before the work, so that these files end at once and in one line."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from swiftmoe_lightning.analysis import Machine, PlanOptions, Sizes, Trace, make_plan, read_trace
from swiftmoe_lightning.analysis.write_trace import write_parquet
from tests.analysis.cases import COUNTS, METADATA, recording

HUGE = 10**12


def header(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """An .npy file that claims `shape`, and its data."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def archive(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in entries.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("name", ["trace.npz", "router_trace_rank0.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_what_never_ends_is_not_read(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="it is no regular file, but a pipe, socket or device"):
        read_trace(path)
    if name.endswith("jsonl"):
        with pytest.raises(ValueError, match=f"{name} is no regular file, but a pipe, socket or device"):
            read_trace(tmp_path)


@pytest.mark.parametrize("name", ["counts", "step", "replicas", "metadata"])
def test_an_array_that_claims_more_than_it_has_is_refused_by_its_header(tmp_path: Path, name: str) -> None:
    whole = header((1, 1, 2), np.array([3, 4]).tobytes())
    path = archive(tmp_path / "trace.npz", **{"counts": whole, name: header((HUGE, 1, 1))})
    with pytest.raises(
        ValueError, match=rf"`{name}` claims the shape \({HUGE}, 1, 1\) of int64, {8 * HUGE} bytes, and has"
    ):
        read_trace(path)


def test_an_array_that_is_too_large_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file of some kilobytes that unpacks to a megabyte.
    monkeypatch.setattr("swiftmoe_lightning.analysis.trace._MOST_BYTES", 2**19)
    path = archive(tmp_path / "trace.npz", counts=header((2**17, 1, 1), bytes(2**20)))
    with pytest.raises(ValueError, match=r"`counts` would take 1048704 bytes, more than 524288\. Take fewer steps"):
        read_trace(path)


def test_a_table_that_claims_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.parquet"
    write_parquet(path, recording(), METADATA)
    table = pq.read_table(path)
    about = {**table.schema.metadata, b"swiftmoe.shape": json.dumps([2, HUGE, 1, 3])}
    pq.write_table(table.replace_schema_metadata(about), path)
    with pytest.raises(ValueError, match=rf"counts of the shape \[2, {HUGE}, 1, 3\] would take {48 * HUGE} bytes"):
        read_trace(path)
    monkeypatch.setattr(sys.modules["swiftmoe_lightning.analysis.read_trace"], "_MOST_ROWS", 4)
    with pytest.raises(ValueError, match="it claims 5 rows, and at most 4 are read"):
        read_trace(path)


def test_router_calls_of_scattered_numbers_make_no_table_of_all_combinations(tmp_path: Path) -> None:
    call: dict[str, Any] = {"num_tokens": 1, "topk": 1, "top_indices": [[60000]]}
    lines = [json.dumps({"step": n, "layer": n, "rank": n, **call}) for n in range(100)]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"counts of the shape \(100, 100, 100, 60001\) would take 480008000000 bytes"):
        read_trace(tmp_path / "trace.jsonl")


def test_a_line_without_an_end_is_not_read_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swiftmoe_lightning.analysis.megatron._LONGEST_LINE", 100)
    (tmp_path / "trace.jsonl").write_text('{"step": ' + "0" * 200)
    with pytest.raises(ValueError, match=r"trace\.jsonl, line 1: it has 100 bytes or more\. Give Megatron's"):
        read_trace(tmp_path / "trace.jsonl")


@pytest.mark.parametrize(("key", "option"), [("world_size", "ranks"), ("slots_per_rank", "slots")])
def test_metadata_of_a_machine_that_cannot_be_is_refused(key: str, option: str) -> None:
    trace = Trace(COUNTS, metadata={**METADATA, key: 10**9})
    with pytest.raises(
        ValueError, match=rf"{key} of the trace's metadata must be at most 65536, got 1000000000\. Give the run's"
    ):
        Sizes.of(trace, None, None, None)
    given = {"ranks": (10**9, 2), "slots": (2, 10**9)}[option]
    with pytest.raises(ValueError, match=f"{option} must be at most 65536, got 1000000000"):
        Sizes.of(trace, *given, None)


def test_a_plan_that_would_fill_the_memory_is_refused() -> None:
    wide = Machine(num_ranks=2**16, slots_per_rank=2**16)
    with pytest.raises(ValueError, match="4294967296 slots on all ranks are more than 1048576"):
        make_plan(Trace(COUNTS), wide, PlanOptions())
    long = Trace(np.ones((2**12, 1, 1, 1), dtype=np.int64))
    with pytest.raises(ValueError, match="a replay would take 4295000064 bytes"):
        make_plan(long, Machine(num_ranks=2**16, slots_per_rank=1), PlanOptions())


@pytest.mark.parametrize("factor", [1e300, 10**400, float("nan"), float("inf"), 0.0, -1.0, "1", True])
def test_a_capacity_factor_out_of_bounds_is_refused_with_the_fix(factor: Any) -> None:
    with pytest.raises(
        ValueError, match=r"capacity_factor must be (a number above 0|at most 1000), got .+ None to drop no"
    ):
        PlanOptions(capacity_factor=factor)


@pytest.mark.parametrize("per", ["rank", "slot"])
def test_the_largest_counts_and_the_largest_factor_go_together(per: str) -> None:
    trace = Trace(np.array([[[[2**49, 2**48]]], [[[5, 2**40]]]]))
    options = PlanOptions(policies=("balanced", "symi"), capacity_factor=1000.0, capacity_per=per)
    plan = make_plan(trace, Machine(num_ranks=2, slots_per_rank=2), options)
    assert [outcome.replay.dropped_UL.sum() for outcome in plan.outcomes.values()] == [0, 0]


@pytest.mark.parametrize("name", ["expert_bytes", "state_bytes", "assignment_bytes"])
def test_bytes_beyond_any_machine_are_refused(name: str) -> None:
    sizes: dict[str, Any] = {name: 10**400}
    with pytest.raises(ValueError, match=f"{name} must be at most 2"):
        Machine(num_ranks=2, slots_per_rank=2, **sizes)
