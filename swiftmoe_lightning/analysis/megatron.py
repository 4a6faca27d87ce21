"""Reads router traces of Megatron-Core into a `Trace`. U steps, W ranks, L layers, E experts.

`--moe-routing-trace-path FOLDER` makes every rank write `FOLDER/router_trace_rank{N}.jsonl`, one line for each router
call (megatron/core/transformer/moe/router_trace.py in https://github.com/NVIDIA/Megatron-LM):

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0, "num_tokens": 2, "topk": 2,
     "top_indices": [[12, 45], [7, 12]]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from swiftmoe_lightning.analysis.trace import Trace, check_bytes
from swiftmoe_lightning.config import check_whole

FILES_OF_A_FOLDER: Final = "router_trace_rank*.jsonl"
_REQUIRED: Final = ("step", "layer", "rank", "num_tokens", "topk", "top_indices")
# Bytes of a line, which is one router call. A longer one is no trace, and is not read to its end.
_LONGEST_LINE: Final = 2**28
# More than any model has. A larger id is damaged, and would make a table of its size.
_MOST_EXPERTS: Final = 2**16


@dataclass(frozen=True, eq=False)
class _Call:
    """One router call.

    Attributes:
        where: its file and line.
        layer: (whether it is outside the decoder, block, MTP head or -1, number).
        num_experts: E, where the line says it.
    """

    where: str
    step: int
    rank: int
    layer: tuple[bool, str, int, int]
    counts_E: np.ndarray
    num_experts: int | None

    @property
    def layer_name(self) -> str:
        is_other, block, head, number = self.layer
        parts = [block] * is_other + [str(head)] * (head >= 0) + [str(number)]
        return ".".join(parts)


def read_megatron(paths: Sequence[Path], num_experts: int | None = None) -> Trace:
    """The counts of all calls in these files, which may be of one rank or of several.

    Fields used: `step`, `layer`, `rank`, `top_indices` ([num_tokens, topk] expert ids), `num_tokens` and `topk`; and,
    where a line has them, `block` and `mtp_idx`, which tell the layers of multi-token prediction (MTP) from the
    decoder's, and `logit_shape`, whose last entry is E. Calls of one step and layer (its micro-batches) add up. A rank
    that did not call a layer in a step has zeros for it. Source ranks are those of the lines, in order
    (`metadata["ranks"]`); layers are named "3", or "mtp.0.1" in MTP.

    The lines are of router calls, so recomputed activations count every token twice. In versions that write `block`,
    each pipeline stage numbers its layers from 0, so that the files of different stages must be read apart.

    Args:
        paths: the files.
        num_experts: E. None takes it from `logit_shape`; without that, it is the highest id plus 1.

    Raises:
        ValueError: with file and line, for what is not such a line, or does not agree with the lines before it; for a
            `num_experts` that is not a whole number of 1 or more.
    """
    if num_experts is not None:
        check_whole(num_experts=num_experts)
    calls = [call for path in paths for call in _calls_of(path)]
    if not calls:
        raise ValueError("there is not one line in it. Trace at least one step with --moe-routing-trace-path.")
    num_experts = _num_experts(calls, num_experts)
    steps, ranks = sorted({call.step for call in calls}), sorted({call.rank for call in calls})
    names = {call.layer: call.layer_name for call in calls}
    layers = sorted(names)
    shape = (len(steps), len(ranks), len(layers), num_experts)
    # A few damaged numbers in several fields would make a table of all their combinations.
    check_bytes(f"counts of the shape {shape}", 8 * math.prod(shape))
    row_of, source_of, layer_of = _positions(steps), _positions(ranks), _positions(layers)
    counts_UWLE = np.zeros(shape, dtype=np.int64)
    for call in calls:
        target_E = counts_UWLE[row_of[call.step], source_of[call.rank], layer_of[call.layer]]
        target_E[: len(call.counts_E)] += call.counts_E
    return Trace(counts_UWLE, [names[layer] for layer in layers], np.array(steps), {"ranks": ranks})


def _positions(values: Iterable[Any]) -> dict[Any, int]:
    return {value: index for index, value in enumerate(values)}


def _num_experts(calls: list[_Call], num_experts: int | None) -> int:
    source = "num_experts"
    for call in calls:
        if call.num_experts is None:
            continue
        if num_experts is None:
            num_experts, source = call.num_experts, call.where
        elif call.num_experts != num_experts:
            raise ValueError(
                f"{call.where}: its logit_shape says {call.num_experts} experts, and {source} says {num_experts}. All "
                "layers need the same number: trace one model to a folder of its own."
            )
    highest = max(calls, key=lambda call: len(call.counts_E))
    if num_experts is not None and len(highest.counts_E) > num_experts:
        raise ValueError(
            f"{highest.where}: expert {len(highest.counts_E) - 1} was chosen, and {source} says that there are "
            f"{num_experts}. Experts are numbered from 0: give the model's number of experts."
        )
    return num_experts or max(len(highest.counts_E), 1)


def _calls_of(path: Path) -> Iterator[_Call]:
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file, but a pipe, socket or device. Take it out of the folder.")
    with path.open("rb") as file:
        for number, line in enumerate(iter(partial(file.readline, _LONGEST_LINE), b""), 1):
            where = f"{path.name}, line {number}"
            if len(line) == _LONGEST_LINE:
                raise ValueError(f"{where}: it has {_LONGEST_LINE} bytes or more. Give Megatron's router trace.")
            if line.strip():
                try:
                    yield _parse(line, where)
                except _LineError as error:
                    raise ValueError(f"{where}: {error}") from None


class _LineError(Exception):
    """What is wrong with a line, and the fix."""


def _parse(line: bytes, where: str) -> _Call:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        if not line.endswith(b"\n"):
            raise _LineError("it is cut off: the run was stopped while it wrote. Delete this last line.") from None
        raise _LineError(f"it is not JSON, {_short(line)}. Give a file that Megatron's router trace wrote.") from None
    if not isinstance(record, dict):
        raise _LineError(f"it must be a JSON object, got {_short(line)}. Give Megatron's router trace.")
    missing = [name for name in _REQUIRED if name not in record]
    if missing:
        raise _LineError(f"it has no {', '.join(missing)}, only {_short(', '.join(record))}. Trace the run again.")
    step, layer, rank, num_tokens, topk = (_whole(record, name) for name in _REQUIRED[:-1])
    block, head = record.get("block", "decoder"), _whole(record, "mtp_idx") if "mtp_idx" in record else -1
    if not isinstance(block, str):
        raise _LineError(f"block must be a string, got {_short(block)}. Trace the run again.")
    ids_N = _expert_ids(record["top_indices"], num_tokens, topk)
    return _Call(where, step, rank, (block != "decoder", block, head, layer), np.bincount(ids_N), _experts_of(record))


def _whole(record: dict[str, Any], name: str) -> int:
    value = record[name]
    # 2**63: the limit of numpy's integers.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise _LineError(f"{name} must be a whole number of 0 or more, got {_short(value)}. Trace the run again.")
    return value


def _expert_ids(top_indices: Any, num_tokens: int, topk: int) -> np.ndarray:
    """[num_tokens * topk] int64."""
    try:
        ids_TK = np.array(top_indices)
    except ValueError:
        raise _LineError("rows of top_indices have different lengths. Trace the run again.") from None
    if not ids_TK.size and num_tokens * topk == 0:
        return np.empty(0, dtype=np.int64)
    if ids_TK.shape != (num_tokens, topk):
        raise _LineError(
            f"top_indices must have the shape [num_tokens, topk] = [{num_tokens}, {topk}], got {list(ids_TK.shape)}. "
            "Trace the run again."
        )
    if ids_TK.dtype.kind not in "iu" or ids_TK.min() < 0 or ids_TK.max() >= _MOST_EXPERTS:
        raise _LineError(f"top_indices must be expert ids, 0, 1, ..., got {_short(top_indices)}. Trace the run again.")
    return ids_TK.reshape(-1).astype(np.int64)


def _experts_of(record: dict[str, Any]) -> int | None:
    shape = record.get("logit_shape")
    if shape is None:
        return None
    if isinstance(shape, list) and len(shape) == 2 and isinstance(shape[1], int) and 0 < shape[1] <= _MOST_EXPERTS:
        return shape[1]
    raise _LineError(f"logit_shape must be [num_tokens, num_experts], got {_short(shape)}. Trace the run again.")


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
