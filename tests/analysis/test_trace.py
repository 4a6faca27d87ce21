from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from swiftmoe_lightning.analysis import Trace

# [2 steps, 1 source, 1 layer, 3 experts]
COUNTS = np.array([[[[7, 0, 2]]], [[[0, 0, 0]]]])


def test_layers_and_steps_are_numbered_unless_they_are_given() -> None:
    trace = Trace(np.ones((2, 3, 4, 5), dtype=np.int64))
    assert (trace.num_steps, trace.num_sources, trace.num_layers, trace.num_experts) == (2, 3, 4, 5)
    assert trace.layers == ("0", "1", "2", "3")
    assert trace.step_U.tolist() == [0, 1]
    assert (trace.metadata, trace.recorded) == ({}, {})
    named = Trace(COUNTS, ["moe"], np.array([5, 9]))
    assert named.layers == ("moe",)
    assert named.step_U.tolist() == [5, 9]


@pytest.mark.parametrize("dtype", [np.int32, np.uint64, np.float16, np.float64])
def test_whole_numbers_of_any_type_are_kept_as_int64(dtype: type) -> None:
    trace = Trace(COUNTS.astype(dtype), recorded={"dropped": np.array([[1], [0]], dtype=dtype)})
    assert trace.counts_UWLE.dtype == trace.recorded["dropped"].dtype == np.int64
    assert trace.counts_UWLE.tolist() == COUNTS.tolist()


def test_popularity_is_the_sum_over_source_ranks() -> None:
    assert Trace(np.array([[[[1, 2]], [[3, 0]]]])).popularity_ULE.tolist() == [[[4, 2]]]


def changed(value: float, dtype: Any = np.float64) -> np.ndarray:
    counts = COUNTS.astype(dtype)
    counts[1, 0, 0, 2] = value
    return counts


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (
            COUNTS[0],
            r"must have 4 axes, \[steps, source ranks, layers, experts\], got shape \(1, 1, 3\)\. Without ranks",
        ),
        (COUNTS[None], r"must have 4 axes.*got shape \(1, 2, 1, 1, 3\)"),
        (
            changed(-3, np.int64),
            r"whole numbers of 0 or more, got -3 at \[1, 0, 0, 2\]\. Give numbers of assignments",
        ),
        (changed(np.nan), r"whole numbers of 0 or more, got nan at \[1, 0, 0, 2\]\. Leave out the steps"),
        (changed(np.inf), r"got inf at \[1, 0, 0, 2\]"),
        (changed(-np.inf), r"got -inf at \[1, 0, 0, 2\]"),
        (changed(0.25), r"got 0\.25 at \[1, 0, 0, 2\]\. Give numbers of assignments, not shares"),
        (changed(1e30), r"add up to no more than 2\*\*50, got 1e\+30"),
        (changed(2**63, np.uint64), r"add up to no more than 2\*\*50, got 9223372036854775808"),
        (COUNTS > 0, r"must be whole numbers, got dtype bool\. Save them as int64"),
        (COUNTS.astype(object), r"must be whole numbers, got dtype object"),
        (COUNTS.astype(str), r"must be whole numbers, got dtype <U"),
        (COUNTS * 1j, r"must be whole numbers, got dtype complex128"),
        (COUNTS[:0], r"at least one step, rank, layer and expert, got shape \(0, 1, 1, 3\)\. Record"),
        (COUNTS[:, :, :0], r"at least one step.*got shape \(2, 1, 0, 3\)"),
        (COUNTS[..., :0], r"at least one step.*got shape \(2, 1, 1, 0\)"),
        (COUNTS[1:], r"of shape \(1, 1, 1, 3\) are all 0, and a plan needs at least one assignment"),
    ],
)
def test_counts_that_cannot_be_counts_are_refused_in_one_line(counts: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^counts .*{message}") as refused:
        Trace(counts)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["a", "b"]}, "layers must name the 1 layers of counts, got 2 names. Leave them out"),
        ({"step_U": np.arange(3)}, "one number for each of the 2 steps of counts, got shape (3,). Leave it out"),
        ({"step_U": np.array([4, 4])}, "step must rise from row to row, got 4 after 4. Leave it out"),
        ({"step_U": np.array([0.5, 1])}, "step must be whole numbers of 0 or more, got 0.5 at [0]"),
        ({"recorded": {"loss": np.zeros(2)}}, "recorded may hold replicas, loads, dropped, moved, got 'loss'."),
        (
            {"recorded": {"dropped": np.zeros((3, 1))}},
            "dropped must have the axes [steps = 2, layers = 1] to fit counts, got shape (3, 1). Drop it.",
        ),
        ({"recorded": {"replicas": np.zeros((2, 1, 4))}}, "[steps = 2, layers = 1, experts = 3] to fit counts, got"),
        ({"recorded": {"loads": np.zeros((2, 2, 4))}}, "[steps = 2, layers = 1, ranks] to fit counts, got"),
        ({"recorded": {"moved": np.full((2, 1), -1)}}, "moved must be whole numbers of 0 or more, got -1 at [0, 0]"),
    ],
)
def test_what_does_not_fit_the_counts_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Trace(COUNTS, **options)


def test_recorded_loads_are_of_the_source_ranks_where_those_are_told_apart() -> None:
    counts = np.ones((2, 3, 1, 4), dtype=np.int64)
    assert Trace(counts, recorded={"loads": np.full((2, 1, 3), 4)}).recorded["loads"].sum() == 24
    with pytest.raises(ValueError, match=r"loads must have the axes \[steps = 2, layers = 1, ranks = 3\]"):
        Trace(counts, recorded={"loads": np.full((2, 1, 6), 2)})
    # Any number of ranks may have shared what nobody knows the sources of.
    loads = np.array([[[2, 2, 2, 1, 1, 1]], [[0] * 6]])
    assert Trace(COUNTS, recorded={"loads": loads}).recorded["loads"].shape == (2, 1, 6)


def test_a_step_cannot_have_dropped_or_computed_more_than_it_had() -> None:
    # The second row has no tokens, the first has 9.
    for name, wrong in (("dropped", [[10], [0]]), ("dropped", [[0], [1]]), ("loads", [[[4, 6]], [[0, 0]]])):
        with pytest.raises(ValueError, match=rf"{name} must be at most the assignments of its step, got (10|1) of"):
            Trace(COUNTS, recorded={name: np.array(wrong)})
    assert Trace(COUNTS, recorded={"dropped": np.array([[9], [0]])}).recorded["dropped"].sum() == 9


def outcome(values: np.ndarray) -> Trace | str:
    """The trace, or why there is none."""
    try:
        return Trace(values)
    except ValueError as refused:
        return str(refused)


@settings(max_examples=50, deadline=None)
@given(
    st_numpy.arrays(
        st.sampled_from([np.int8, np.uint16, np.float32, np.bool_, np.complex64]),
        st_numpy.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3),
    )
)
def test_whatever_the_array_it_is_a_trace_or_is_refused(values: np.ndarray) -> None:
    result = outcome(values)
    if isinstance(result, str):
        assert result.startswith("counts ")
    else:
        assert result.counts_UWLE.dtype == np.int64
        np.testing.assert_array_equal(result.counts_UWLE, values)
