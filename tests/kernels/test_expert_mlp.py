import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.kernels import ACTIVATIONS, expert_mlp, grouped, reference
from tests.kernels.cases import assert_close, gradients, leaves, loop_mlp, make_weights

COUNTS = [[3, 0, 5], [0, 0, 4], [1], [0, 7, 0, 1], [0, 0], [17, 2]]


def run_both(counts, dim, hidden_dim, activation, bias, dtype):
    """(out, gradients) of `expert_mlp` in `dtype` and of the row loop in float64 on the same rounded values."""
    generator = torch.Generator().manual_seed(sum(counts))
    values = {"x": torch.randn(sum(counts), dim, generator=generator).to(dtype)}
    values |= make_weights(len(counts), dim, hidden_dim, activation, bias, dtype)
    fast, slow = leaves(values), leaves(values, torch.float64)
    ends_s = torch.tensor(counts).cumsum(0).to(torch.int32)
    slot_R = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).tolist()
    out = expert_mlp(fast["x"], {k: v for k, v in fast.items() if k != "x"}, ends_s, activation)
    expected = loop_mlp(slow["x"], slow, slot_R, activation)
    return (out, gradients(out, fast)), (expected, gradients(expected, slow))


def assert_equal_runs(found, expected):
    assert_close(found[0], expected[0])
    for name, gradient in found[1].items():
        assert_close(gradient, expected[1][name])


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_equal_a_loop_over_rows(counts, activation, bias):
    assert_equal_runs(*run_both(counts, 5, 3, activation, bias, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("sizes", [(16, 8), (8, 24)])
def test_the_grouped_matmul_equals_a_loop_over_rows(dtype, counts, sizes):
    assert_equal_runs(*run_both(counts, *sizes, "swiglu", True, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (4, 2), (9, 16)])
def test_odd_sizes_work_in_every_dtype(dtype, sizes):
    assert_equal_runs(*run_both([2, 0, 3], *sizes, "gelu", True, dtype))


@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    dim=st.integers(1, 9),
    hidden_dim=st.integers(1, 9),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_sizes_equal_a_loop_over_rows(counts, dim, hidden_dim, activation, bias):
    assert_equal_runs(*run_both(counts, dim, hidden_dim, activation, bias, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_path_is_taken_where_it_can_be_and_equals_the_reference(dtype, monkeypatch):
    x_RI = torch.randn(6, 16).to(dtype)
    weight_sOI, bias_sO = torch.randn(3, 8, 16).to(dtype), torch.randn(3, 8).to(dtype)
    ends_s = torch.tensor([2, 2, 6], dtype=torch.int32)
    expected = reference.grouped_linear(x_RI, weight_sOI, ends_s, bias_sO)
    monkeypatch.setattr(reference, "grouped_linear", None)
    assert_close(grouped.grouped_linear(x_RI, weight_sOI, ends_s, bias_sO), expected)


def test_reference_gradients_pass_gradcheck():
    ends_s = torch.tensor([2, 2, 3], dtype=torch.int32)
    shapes = [(3, 4), (3, 2, 4), (3, 2)]
    inputs = tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(lambda x, w, b: reference.grouped_linear(x, w, ends_s, b), inputs)


@pytest.mark.parametrize("sizes", [(5, 3), (16, 8)], ids=["reference", "grouped"])
def test_poison_in_one_experts_rows_or_weights_stays_there(sizes):
    dim, hidden_dim = sizes
    weights = leaves(make_weights(3, dim, hidden_dim, "swiglu", True, torch.float32))
    x_RD = torch.randn(6, dim)
    x_RD[:2] = float("nan")
    with torch.no_grad():
        weights["down_proj"][2] = float("inf")
    x_RD.requires_grad_()
    # Rows 0-1 (poisoned) belong to slot 0, rows 2-4 to slot 1, row 5 to slot 2, whose weights are poisoned.
    out = expert_mlp(x_RD, weights, torch.tensor([2, 5, 6], dtype=torch.int32), "swiglu")
    out.sum().backward()
    assert out[2:5].isfinite().all()
    assert x_RD.grad[2:5].isfinite().all()
    for weight in weights.values():
        assert weight.grad[1].isfinite().all()


@pytest.mark.parametrize("sizes", [(5, 3), (16, 8)], ids=["reference", "grouped"])
def test_slots_without_rows_get_zero_gradients(sizes):
    (_, found), _ = run_both([0, 4, 0], *sizes, "swiglu", True, torch.float32)
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
        assert not found[name][[0, 2]].any()
        assert found[name][1].any()
