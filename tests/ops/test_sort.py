import pytest
import torch

from swiftmoe_lightning.ops import backend, sort_assignments
from tests.ops.cases import DEVICE, fenced_memory


@pytest.mark.usefixtures("each_backend")
def test_assignments_are_sorted_by_group_and_keep_their_order_inside_one():
    # Group 1 is empty; 7 and -1 are unassigned.
    actual = sort_assignments(torch.tensor([[2, 0], [7, 2], [-1, 0]]), 3)
    assert actual.assignment_R.tolist() == [1, 5, 0, 3, -1, -1]
    assert actual.rows_TK.tolist() == [[2, 0], [-1, 3], [-1, 1]]
    assert actual.counts_G.tolist() == [2, 0, 2]
    assert actual.ends_G.tolist() == [2, 2, 4]
    assert all(t.dtype == torch.int32 for t in actual)


@pytest.fixture(params=["one launch for few", "three launches"])
def each_kernel(request, monkeypatch):
    """Few assignments are sorted by the kernel for them, or by those for many."""
    if request.param == "three launches":
        kernels = pytest.importorskip("swiftmoe_lightning.ops.triton.sort")
        monkeypatch.setattr(kernels, "FEW_ASSIGNMENTS", 0)


@pytest.mark.usefixtures("each_backend", "each_kernel")
@pytest.mark.parametrize("num_assignments", [0, 1, 7, 128, 300, 1100])
@pytest.mark.parametrize("num_groups", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_order_is_that_of_a_stable_sort(num_assignments, num_groups, dtype):
    generator = torch.Generator().manual_seed(num_assignments)
    group_N = torch.randint(-1, num_groups + 2, (num_assignments,), generator=generator, device="cpu").to(DEVICE, dtype)
    with fenced_memory():
        actual, again = (sort_assignments(group_N.unsqueeze(1), num_groups) for _ in range(2))
    is_assigned = (group_N >= 0) & (group_N < num_groups)
    num_rows = int(is_assigned.sum())
    expected_R = torch.argsort(torch.where(is_assigned, group_N, num_groups), stable=True)[:num_rows]
    assert torch.equal(actual.assignment_R[:num_rows].long(), expected_R)
    assert (actual.assignment_R[num_rows:] == -1).all()
    assert torch.equal(actual.rows_TK[expected_R, 0].long(), torch.arange(num_rows, device=DEVICE))
    assert (actual.rows_TK[~is_assigned] == -1).all()
    assert torch.equal(actual.counts_G.long(), torch.bincount(group_N[is_assigned], minlength=num_groups))
    assert torch.equal(actual.ends_G.long(), actual.counts_G.cumsum(0))
    assert all(torch.equal(first, second) for first, second in zip(actual, again, strict=True))


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("group", [0, 4, 5, -(2**31), 2**31 - 1])
def test_all_assignments_in_one_group_or_in_none(group):
    actual = sort_assignments(torch.full((131, 1), group), 5)
    num_rows = 131 if group in (0, 4) else 0
    assert actual.assignment_R.tolist() == list(range(num_rows)) + [-1] * (131 - num_rows)
    assert actual.ends_G.tolist() == [num_rows if end >= group and num_rows else 0 for end in range(5)]


def test_groups_may_be_a_strided_view():
    strided_T1 = torch.randint(4, (40, 3), device=DEVICE)[:, 1:2]
    for name in ("torch", "triton"):
        if name == "triton":
            pytest.importorskip("triton")
        with backend.force_backend(name):
            actual, expected = sort_assignments(strided_T1, 4), sort_assignments(strided_T1.clone(), 4)
            assert torch.equal(actual.assignment_R, expected.assignment_R)
