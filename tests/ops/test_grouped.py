import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.ops import ACTIVATIONS, expert_mlp, grouped
from tests.ops.cases import assert_close, gradients, leaves, loop_mlp, make_weights

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


def assert_equal_runs(actual, expected):
    assert_close(actual[0], expected[0])
    for name, gradient in actual[1].items():
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
def test_the_grouped_matmul_is_used_where_it_can_be_and_equals_the_eager_version(dtype, monkeypatch):
    x_RI, weight_sOI = torch.randn(6, 16).to(dtype), torch.randn(3, 8, 16).to(dtype)
    ends_s = torch.tensor([2, 2, 6], dtype=torch.int32)
    expected = grouped.eager_grouped_linear(x_RI, weight_sOI, ends_s)
    monkeypatch.setattr(grouped, "eager_grouped_linear", None)
    assert_close(grouped.grouped_linear(x_RI, weight_sOI, ends_s), expected)


# With and without rows that are unassigned.
@pytest.mark.parametrize("ends", [(2, 2, 3), (1, 1, 2)])
def test_eager_gradients_pass_gradcheck_and_equal_the_written_ones(ends):
    ends_s = torch.tensor(ends, dtype=torch.int32)
    inputs = tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 4), (3, 2, 4)])
    assert torch.autograd.gradcheck(lambda x, w: grouped.eager_grouped_linear(x, w, ends_s), inputs)
    grad_RO = torch.randn(3, 2, dtype=torch.float64)
    expected = torch.autograd.grad(grouped.eager_grouped_linear(*inputs, ends_s), inputs, grad_RO)
    for actual, gradient in zip(grouped.eager_grouped_linear_backward(grad_RO, *inputs, ends_s), expected, strict=True):
        assert_close(actual, gradient)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Neither, both, and one of the two matrices of sizes that grouped_mm takes.
@pytest.mark.parametrize("sizes", [(5, 3), (16, 8), (16, 12)])
def test_rows_that_are_unassigned_change_nothing(wrap, dtype, sizes):
    values = {"x": torch.randn(4, sizes[0]).to(dtype)} | make_weights(3, *sizes, "swiglu", True, dtype)
    ends_s = torch.tensor([1, 1, 4], dtype=torch.int32)
    actual, expected = leaves(values), leaves(values)

    def with_more_rows(x_RD, **weights):
        out = expert_mlp(torch.cat([x_RD, x_RD.new_full((3, x_RD.shape[1]), float("nan"))]), weights, ends_s, "swiglu")
        # As combine does: it reads none of them, and gives them a gradient of zero.
        return torch.where(torch.arange(7).unsqueeze(1) < 4, out, 0.0)[:4]

    kept = wrap(with_more_rows)(actual["x"], **{k: v for k, v in actual.items() if k != "x"})
    whole = expert_mlp(expected["x"], {k: v for k, v in expected.items() if k != "x"}, ends_s, "swiglu")
    assert_close(kept, whole)
    found_gradients = gradients(kept, actual)
    for name, gradient in gradients(whole, expected).items():
        assert_close(found_gradients[name], gradient)


@pytest.mark.parametrize("sizes", [(5, 3), (16, 8)], ids=["eager", "grouped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_poison_in_one_experts_rows_or_weights_shows_there_and_nowhere_else(sizes, activation):
    dim, hidden_dim = sizes
    weights = leaves(make_weights(3, dim, hidden_dim, activation, True, torch.float32))
    x_RD = torch.randn(6, dim)
    x_RD[:2] = float("nan")
    with torch.no_grad():
        weights["down_proj"][2] = float("inf")
    x_RD.requires_grad_()
    # Rows 0-1 (poisoned) belong to slot 0, rows 2-4 to slot 1, row 5 to slot 2, whose weights are poisoned.
    out = expert_mlp(x_RD, weights, torch.tensor([2, 5, 6], dtype=torch.int32), activation)
    out.sum().backward()
    for actual in (out, x_RD.grad):
        assert actual[:2].isnan().all()
        assert actual[2:5].isfinite().all()
    for name, weight in weights.items():
        # The last bias gets the outputs' gradient alone.
        assert weight.grad[0].isnan().any() == (name != "down_proj_bias")
        assert weight.grad[1].isfinite().all()


@pytest.mark.parametrize("sizes", [(5, 3), (16, 8)], ids=["eager", "grouped"])
def test_slots_without_rows_get_zero_gradients(sizes):
    (_, actual), _ = run_both([0, 4, 0], *sizes, "swiglu", True, torch.float32)
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
        assert not actual[name][[0, 2]].any()
        assert actual[name][1].any()
