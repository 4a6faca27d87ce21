from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swiftmoe_lightning.analysis import read_megatron, read_trace


def call(step: int, layer: int, top_indices: list[list[int]], rank: int = 0, **fields: Any) -> dict[str, Any]:
    """One line, as Megatron's tracer writes it since it has the field `block`."""
    shape = np.shape(top_indices)
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": shape[0],
        "topk": shape[1],
        "top_indices": top_indices,
        **fields,
    }


def write(path: Path, *calls: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in calls))
    return path


def without(line: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in names}


def test_expert_ids_are_counted_by_step_and_layer(tmp_path: Path) -> None:
    path = write(
        tmp_path / "router_trace_rank3.jsonl",
        call(0, 1, [[0, 2], [2, 1]], 3),
        call(0, 10, [[3, 1], [3, 0]], 3),
        call(2, 1, [[0, 1], [0, 1]], 3),
    )
    trace = read_trace(path)
    assert trace.counts_UWLE.tolist() == [[[[1, 1, 2, 0], [1, 1, 0, 2]]], [[[2, 2, 0, 0], [0, 0, 0, 0]]]]
    assert trace.layers == ("1", "10")
    assert trace.step_U.tolist() == [0, 2]
    assert trace.metadata == {"ranks": [3]}
    assert trace.recorded == {}


def test_a_folder_is_read_with_the_files_of_all_ranks(tmp_path: Path) -> None:
    for rank in (0, 2, 10):
        write(tmp_path / f"router_trace_rank{rank}.jsonl", call(0, 0, [[rank // 2]] * (rank + 1), rank))
    # A rank that called no router leaves an empty file.
    write(tmp_path / "router_trace_rank1.jsonl")
    (tmp_path / "hidden_states_rank0.bin").write_bytes(b"\x00")
    trace = read_trace(tmp_path)
    assert trace.metadata == {"ranks": [0, 2, 10]}
    assert trace.counts_UWLE[0, :, 0].tolist() == [[1, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0], [0, 0, 0, 0, 0, 11]]


def test_calls_of_a_layer_in_one_step_add_up(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", call(0, 0, [[1], [0]]), call(0, 0, [[1]]), call(0, 0, [[1], [2]]))
    assert read_trace(path).counts_UWLE.tolist() == [[[[1, 3, 1]]]]


def test_multi_token_predictions_layers_are_told_from_the_decoders(tmp_path: Path) -> None:
    path = write(
        tmp_path / "trace.jsonl",
        call(0, 1, [[1]], block="mtp", mtp_idx=0),
        call(0, 1, [[0]]),
        call(0, 1, [[0]], block="mtp", mtp_idx=1),
    )
    trace = read_trace(path)
    assert trace.layers == ("1", "mtp.0.1", "mtp.1.1")
    assert trace.counts_UWLE[0, 0].tolist() == [[1, 0], [0, 1], [1, 0]]


def test_lines_from_before_blocks_are_read_and_so_are_those_with_sidecars(tmp_path: Path) -> None:
    path = write(
        tmp_path / "trace.jsonl",
        without(call(0, 1, [[1]], hs_offset=0, hs_bytes=8, hs_shape=[1, 4]), "stage", "block"),
        without(call(0, 2, [[0]]), "stage", "block"),
    )
    trace = read_trace(path)
    assert trace.layers == ("1", "2")
    assert trace.counts_UWLE[0, 0].tolist() == [[0, 1], [1, 0]]


def test_a_call_without_tokens_and_blank_lines_count_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", call(0, 0, [[1]]), {**call(1, 0, [[0]]), "num_tokens": 0, "top_indices": []})
    path.write_text(path.read_text() + "\n \n")
    assert read_trace(path).counts_UWLE.tolist() == [[[[0, 1]]], [[[0, 0]]]]


def test_experts_that_no_token_chose_come_from_the_caller_or_from_logits(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", call(0, 0, [[1], [0]]))
    assert read_trace(path).num_experts == 2
    assert read_megatron([path], num_experts=8).counts_UWLE.tolist() == [[[[1, 1, 0, 0, 0, 0, 0, 0]]]]
    write(path, call(0, 0, [[1], [0]]), call(1, 0, [[0]], logit_shape=[1, 4]))
    assert read_trace(path).counts_UWLE.tolist() == [[[[1, 1, 0, 0]]], [[[1, 0, 0, 0]]]]


GOOD = call(0, 0, [[0, 1], [1, 2]])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("step 4", "it is not JSON, b'step 4\\n'. Give a file that Megatron's router trace wrote."),
        ('{"step": 1, "layer": 0, "rank"\n{}', "it is not JSON, "),
        ("\ufeff", "it is not JSON, "),
        ("[" * 100_000, "it is not JSON, "),
        ("[0, 1]", "it must be a JSON object, got b'[0, 1]\\n'."),
        (
            without(GOOD, "topk", "layer"),
            "it has no layer, topk, only step, stage, block, rank, num_tokens, top_indices.",
        ),
        ({**GOOD, "step": -1}, "step must be a whole number of 0 or more, got -1."),
        ({**GOOD, "layer": "3"}, "layer must be a whole number of 0 or more, got 3."),
        ({**GOOD, "rank": None}, "rank must be a whole number of 0 or more, got None."),
        ({**GOOD, "topk": 10**30}, "topk must be a whole number of 0 or more, got 1000"),
        ({**GOOD, "mtp_idx": 0.5}, "mtp_idx must be a whole number of 0 or more, got 0.5."),
        ({**GOOD, "block": 7}, "block must be a string, got 7."),
        ({**GOOD, "topk": 3}, "top_indices must have the shape [num_tokens, topk] = [2, 3], got [2, 2]."),
        ({**GOOD, "top_indices": []}, "top_indices must have the shape [num_tokens, topk] = [2, 2], got [0]."),
        ({**GOOD, "top_indices": 5}, "top_indices must have the shape [num_tokens, topk] = [2, 2], got []."),
        ({**GOOD, "top_indices": [[0, 1], [2]]}, "rows of top_indices have different lengths."),
        (
            {**GOOD, "top_indices": [[0, 1], [2, -1]]},
            "top_indices must be expert ids, 0, 1, ..., got [[0, 1], [2, -1]].",
        ),
        ({**GOOD, "top_indices": [[0, 1], [2, 10**9]]}, "top_indices must be expert ids"),
        ({**GOOD, "top_indices": [[0, 1], [2, 10**30]]}, "top_indices must be expert ids"),
        ({**GOOD, "top_indices": [[0, 1], [2, 0.5]]}, "top_indices must be expert ids"),
        ({**GOOD, "top_indices": [[0, 1], [2, float("nan")]]}, "top_indices must be expert ids"),
        ({**GOOD, "top_indices": [["a", "b"], ["c", "d"]]}, "top_indices must be expert ids"),
        ({**GOOD, "logit_shape": [2]}, "logit_shape must be [num_tokens, num_experts], got [2]."),
        ({**GOOD, "logit_shape": [2, 0]}, "logit_shape must be [num_tokens, num_experts], got [2, 0]."),
        (
            {**GOOD, "logit_shape": [2, 4]},
            "its logit_shape says 4 experts, and trace.jsonl, line 1 says 3. All layers need the same number",
        ),
        (
            {**GOOD, "top_indices": [[0, 1], [2, 7]]},
            "expert 7 was chosen, and trace.jsonl, line 1 says that there are 3. Experts are numbered from 0",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str | dict[str, Any], message: str) -> None:
    path = write(tmp_path / "trace.jsonl", {**GOOD, "logit_shape": [2, 3]})
    path.write_text(path.read_text() + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: trace.jsonl, line 2: {message}")) as refused:
        read_trace(path)
    assert "\n" not in str(refused.value)


def test_a_last_line_that_is_cut_off_is_named(tmp_path: Path) -> None:
    write(tmp_path / "router_trace_rank0.jsonl", GOOD)
    path = write(tmp_path / "router_trace_rank1.jsonl", {**GOOD, "rank": 1}, {**GOOD, "rank": 1})
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"router_trace_rank1\.jsonl, line 2: it is cut off.*Delete this last line"):
        read_trace(tmp_path)
    # Only the line's end is missing.
    path.write_text(json.dumps({**GOOD, "rank": 1}))
    assert read_trace(tmp_path).num_sources == 2


def test_a_chosen_expert_must_be_one_of_those_that_the_caller_tells_of(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.jsonl", GOOD)
    with pytest.raises(ValueError, match="line 1: expert 2 was chosen, and num_experts says that there are 2"):
        read_megatron([path], num_experts=2)
    with pytest.raises(ValueError, match=r"num_experts must be a whole number of 1 or more, got 2\.0"):
        read_megatron([path], num_experts=2.0)  # type: ignore[arg-type]


def test_files_without_lines_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "router_trace_rank0.jsonl")
    with pytest.raises(ValueError, match="there is not one line in it. Trace at least one step"):
        read_trace(tmp_path)
