import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swiftmoe_lightning.ops import combine, permute, sort_assignments, unpermute
from tests.ops.cases import assert_close, assert_triton_equals_eager, gradients, leaves, one_group, scrambled


@pytest.mark.usefixtures("each_backend")
def test_permute_copies_each_assignments_token_to_its_row():
    x_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # Token 0 has two assignments, of which one was dropped; rows: token 1's 2nd, token 0's 1st, token 1's 1st.
    assignments = one_group(torch.tensor([3, 0, 2]), torch.tensor([[1, -1], [2, 0]]))
    assert permute(x_TD, assignments).tolist() == [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]


@pytest.mark.usefixtures("each_backend")
def test_combine_sums_each_tokens_rows_by_weight_and_skips_dropped_assignments():
    y_RD = torch.tensor([[10.0, 0.0], [1.0, 2.0], [0.0, 100.0]])
    weights_TK = torch.tensor([[0.5, 9.0], [2.0, 1.0]])
    assignments = one_group(torch.tensor([3, 0, 2]), torch.tensor([[1, -1], [2, 0]]))
    assert combine(y_RD, weights_TK, assignments).tolist() == [[0.5, 1.0], [10.0, 200.0]]


@pytest.mark.usefixtures("each_backend")
def test_unpermute_brings_rows_back_to_where_permute_took_them_from():
    # Token 2 is unassigned.
    by_group = sort_assignments(torch.tensor([[1], [0], [7], [1]]), 2)
    x_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    rows_RD = permute(x_TD, by_group).requires_grad_()
    assert rows_RD.tolist() == [[3.0, 4.0], [1.0, 2.0], [7.0, 8.0], [0.0, 0.0]]
    out_TD = unpermute(rows_RD, by_group)
    assert out_TD.tolist() == [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0], [7.0, 8.0]]
    out_TD.backward(x_TD)
    assert rows_RD.grad.tolist() == rows_RD.tolist()


def loop_permute(x_TD, assignment_R, top_k):
    rows = [x_TD[assignment // top_k] for assignment in assignment_R.tolist()]
    return torch.stack(rows) if rows else x_TD[:0]


def loop_combine(y_RD, weights_TK, rows_TK):
    out = []
    for weights_K, rows_K in zip(weights_TK, rows_TK.tolist(), strict=True):
        total = y_RD.new_zeros(y_RD.shape[1])
        for weight, row in zip(weights_K, rows_K, strict=True):
            if row >= 0:
                total = total + weight * y_RD[row]
        out.append(total)
    return torch.stack(out) if out else y_RD.new_zeros(0, y_RD.shape[1])


@st.composite
def masks(draw):
    num_tokens, top_k = draw(st.integers(0, 7)), draw(st.integers(1, 3))
    kept = draw(st.lists(st.booleans(), min_size=num_tokens * top_k, max_size=num_tokens * top_k))
    return torch.tensor(kept, dtype=torch.bool).view(num_tokens, top_k)


@given(masks(), st.integers(1, 5), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_permute_and_its_gradient_equal_a_loop_over_assignments(kept_TK, dim, dtype):
    assignments = scrambled(kept_TK)
    x = {"x": torch.randn(len(kept_TK), dim, generator=torch.Generator().manual_seed(1))}
    fast, slow = leaves(x, dtype), leaves({"x": x["x"].to(dtype)}, torch.float64)
    out, expected = permute(fast["x"], assignments), loop_permute(slow["x"], assignments.assignment_R, kept_TK.shape[1])
    assert out.dtype == dtype
    assert_close(out, expected)
    assert_close(gradients(out, fast)["x"], gradients(expected, slow)["x"])


@given(masks(), st.integers(1, 5), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
@settings(max_examples=60, deadline=None)
def test_combine_and_its_gradients_equal_a_loop_over_tokens(kept_TK, dim, dtype):
    assignments = scrambled(kept_TK)
    generator = torch.Generator().manual_seed(2)
    values = {
        "y": torch.randn(len(assignments.assignment_R), dim, generator=generator).to(dtype),
        "weights": torch.randn(kept_TK.shape, generator=generator).to(dtype),
    }
    fast, slow = leaves(values), leaves(values, torch.float64)
    out = combine(fast["y"], fast["weights"], assignments)
    expected = loop_combine(slow["y"], slow["weights"], assignments.rows_TK)
    assert out.dtype == dtype
    assert_close(out, expected)
    if len(assignments.assignment_R):
        slow_gradients = gradients(expected, slow)
        for name, gradient in gradients(out, fast).items():
            assert_close(gradient, slow_gradients[name])


@pytest.mark.usefixtures("each_backend")
def test_weights_may_be_wider_than_the_rows():
    kept_TK = torch.ones(3, 2, dtype=torch.bool)
    assignments = scrambled(kept_TK)
    y_RD = torch.randn(6, 4).bfloat16().requires_grad_()
    weights_TK = torch.rand(3, 2, requires_grad=True)
    out = combine(y_RD, weights_TK, assignments)
    out.sum().backward()
    assert (out.dtype, y_RD.grad.dtype, weights_TK.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_gradients_pass_gradcheck():
    assignments = scrambled(torch.tensor([[True, False], [True, True], [False, False]]))
    x_TD, y_RD, weights_TK = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 2)] * 3)
    assert torch.autograd.gradcheck(lambda x: permute(x, assignments), x_TD)
    assert torch.autograd.gradcheck(lambda y, w: combine(y, w, assignments), (y_RD, weights_TK))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_in_a_row_reaches_only_the_tokens_that_own_it(poison):
    # Row 0, the one that stands in for "no row", belongs to token 0 and is poisoned; token 1 has a dropped assignment.
    assignments = one_group(torch.tensor([0, 2]), torch.tensor([[0, -1], [1, -1]]))
    y_RD = torch.tensor([[poison, poison], [1.0, 2.0]], requires_grad=True)
    weights_TK = torch.tensor([[0.5, poison], [0.5, poison]], requires_grad=True)
    out_TD = combine(y_RD, weights_TK, assignments)
    assert out_TD[1].tolist() == [0.5, 1.0]
    out_TD[1].sum().backward()
    assert y_RD.grad[1].tolist() == [0.5, 0.5]
    assert weights_TK.grad[1].tolist() == [3.0, 0.0]


@pytest.mark.usefixtures("each_backend")
def test_poison_in_a_rows_gradient_reaches_only_its_own_token():
    assignments = one_group(torch.tensor([0, 2]), torch.tensor([[0, -1], [1, -1]]))
    x_TD = torch.ones(2, 2, requires_grad=True)
    permute(x_TD, assignments).backward(torch.tensor([[float("nan")] * 2, [1.0, 2.0]]))
    assert x_TD.grad[1].tolist() == [1.0, 2.0]


@pytest.mark.usefixtures("each_backend")
def test_rows_that_are_unassigned_are_zero_and_stay_unread():
    # Rows 1 and 3 are unassigned; token 1's second assignment has no row.
    assignments = one_group(torch.tensor([2, -1, 0, -1, 1]), torch.tensor([[2, 4], [0, -1]]))
    x_TD = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    rows_RD = permute(x_TD, assignments)
    assert rows_RD.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0]]
    unassigned_R = assignments.assignment_R < 0
    rows_RD.backward(torch.ones(5, 2).masked_fill(unassigned_R.unsqueeze(-1), float("nan")))
    assert x_TD.grad.tolist() == [[2.0, 2.0], [1.0, 1.0]]
    y_RD = torch.ones(5, 2).masked_fill(unassigned_R.unsqueeze(-1), float("nan")).requires_grad_()
    weights_TK = torch.tensor([[2.0, 3.0], [4.0, float("nan")]], requires_grad=True)
    out_TD = combine(y_RD, weights_TK, assignments)
    assert out_TD.tolist() == [[5.0, 5.0], [4.0, 4.0]]
    out_TD.sum().backward()
    assert y_RD.grad.tolist() == [[4.0, 4.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [3.0, 3.0]]
    assert weights_TK.grad.tolist() == [[2.0, 2.0], [2.0, 0.0]]


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize(("num_tokens", "num_rows"), [(0, 0), (0, 3), (2, 0)])
def test_no_tokens_and_no_rows(num_tokens, num_rows):
    assignments = one_group(torch.full((num_rows,), -1), torch.full((num_tokens, 2), -1))
    x_TD, y_RD = torch.randn(num_tokens, 5, requires_grad=True), torch.randn(num_rows, 5, requires_grad=True)
    weights_TK = torch.randn(num_tokens, 2, requires_grad=True)
    rows_RD, out_TD = permute(x_TD, assignments), combine(y_RD, weights_TK, assignments)
    assert (rows_RD.shape, out_TD.shape) == ((num_rows, 5), (num_tokens, 5))
    (rows_RD.sum() + out_TD.sum()).backward()
    for value in (rows_RD, out_TD, x_TD.grad, y_RD.grad, weights_TK.grad):
        assert not value.any()


@pytest.mark.usefixtures("each_backend")
def test_an_infinite_gradient_does_not_reach_the_weight_of_an_assignment_without_a_row():
    assignments = one_group(torch.tensor([0]), torch.tensor([[0, -1]]))
    weights_TK = torch.ones(1, 2, requires_grad=True)
    combine(torch.ones(1, 3), weights_TK, assignments).backward(torch.full((1, 3), float("inf")))
    assert weights_TK.grad.tolist() == [[float("inf"), 0.0]]


# T tokens, K top-k, D model dim; more than one column block in the last.
SIZES = [(1, 1, 1), (7, 3, 33), (7, 4, 100), (5, 2, 1), (3, 1, 1030)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", ["all", "some", "none"])
def test_tritons_rows_equal_the_eager_ones(sizes, dtype, kept):
    num_tokens, top_k, dim = sizes
    generator = torch.Generator().manual_seed(3)
    kept_TK = torch.rand(num_tokens, top_k, generator=generator) < {"all": 2.0, "some": 0.5, "none": -1.0}[kept]
    assignments = scrambled(kept_TK)
    x_TD = torch.randn(num_tokens, dim, generator=generator).to(dtype)
    y_RD = torch.randn(len(assignments.assignment_R), dim, generator=generator).to(dtype)
    weights_TK = torch.randn(num_tokens, top_k, generator=generator)
    assert_triton_equals_eager(permute, {"x": x_TD}, assignments)
    assert_triton_equals_eager(combine, {"y": y_RD, "weights": weights_TK}, assignments)


def test_tritons_rows_take_what_the_sort_returns():
    generator = torch.Generator().manual_seed(4)
    # Experts 0..2, of which nobody chose 1; 3 is unassigned.
    expert_ids_TK = torch.tensor([0, 2, 3])[torch.randint(3, (9, 2), generator=generator)]
    assignments = sort_assignments(expert_ids_TK, 3)
    assert_triton_equals_eager(permute, {"x": torch.randn(9, 20, generator=generator)}, assignments)
    values = {"y": torch.randn(18, 20, generator=generator), "weights": torch.rand(9, 2, generator=generator)}
    assert_triton_equals_eager(combine, values, assignments)


@pytest.mark.usefixtures("each_backend")
def test_inputs_may_have_any_strides():
    assignments = scrambled(torch.ones(4, 2, dtype=torch.bool))
    assignment_R, rows_TK, *_ = assignments
    strided = one_group(assignment_R, torch.stack([rows_TK, rows_TK], dim=-1)[..., 0])
    x_TD = torch.randn(6, 4).t()
    assert torch.equal(permute(x_TD, strided), x_TD[assignment_R // 2])
    y_RD, weights_TK = torch.randn(6, 8).t().requires_grad_(), torch.rand(2, 4).t()
    out_TD = combine(y_RD, weights_TK, strided)
    assert_close(out_TD, (y_RD[rows_TK] * weights_TK.unsqueeze(-1)).sum(1))
    # The gradient of a sum is one number, expanded.
    out_TD.sum().backward()
    assert_close(y_RD.grad, weights_TK.reshape(-1)[assignment_R].unsqueeze(-1).expand(8, 6))
