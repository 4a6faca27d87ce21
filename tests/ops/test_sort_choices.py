import pytest
import torch

from swiftmoe_lightning.ops import backend, sort_choices
from tests.ops.cases import DEVICE, fenced_memory


@pytest.mark.usefixtures("path")
def test_choices_are_sorted_by_group_and_keep_their_order_inside_one():
    # Group 1 is empty; 7 and -1 are unassigned.
    found = sort_choices(torch.tensor([2, 0, 7, 2, -1, 0]), 3)
    assert found.choice_N.tolist() == [1, 5, 0, 3, -1, -1]
    assert found.row_N.tolist() == [2, 0, -1, 3, -1, 1]
    assert found.counts_G.tolist() == [2, 0, 2]
    assert found.ends_G.tolist() == [2, 2, 4]
    assert all(t.dtype == torch.int32 for t in found)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("num_assignments", [0, 1, 7, 128, 300])
@pytest.mark.parametrize("num_groups", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_order_is_that_of_a_stable_sort(num_assignments, num_groups, dtype):
    generator = torch.Generator().manual_seed(num_assignments)
    key_N = torch.randint(-1, num_groups + 2, (num_assignments,), generator=generator, device="cpu").to(DEVICE, dtype)
    with fenced_memory():
        found, again = sort_choices(key_N, num_groups), sort_choices(key_N, num_groups)
    is_assigned = (key_N >= 0) & (key_N < num_groups)
    num_rows = int(is_assigned.sum())
    expected_R = torch.argsort(torch.where(is_assigned, key_N, num_groups), stable=True)[:num_rows]
    assert torch.equal(found.choice_N[:num_rows].long(), expected_R)
    assert (found.choice_N[num_rows:] == -1).all()
    assert torch.equal(found.row_N[expected_R].long(), torch.arange(num_rows, device=DEVICE))
    assert (found.row_N[~is_assigned] == -1).all()
    assert torch.equal(found.counts_G.long(), torch.bincount(key_N[is_assigned], minlength=num_groups))
    assert torch.equal(found.ends_G.long(), found.counts_G.cumsum(0))
    assert all(torch.equal(first, second) for first, second in zip(found, again, strict=True))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("key", [0, 4, 5, -(2**31), 2**31 - 1])
def test_all_choices_in_one_group_or_in_none(key):
    found = sort_choices(torch.full((131,), key), 5)
    num_rows = 131 if key in (0, 4) else 0
    assert found.choice_N.tolist() == list(range(num_rows)) + [-1] * (131 - num_rows)
    assert found.ends_G.tolist() == [num_rows if group >= key and num_rows else 0 for group in range(5)]


def test_a_key_may_be_a_strided_view():
    expert_ids_TK = torch.randint(4, (40, 3), device=DEVICE)
    for path in ("torch", "triton"):
        if path == "triton":
            pytest.importorskip("triton")
        with backend.force_backend(path):
            assert torch.equal(sort_choices(expert_ids_TK[:, 1], 4)[0], sort_choices(expert_ids_TK[:, 1].clone(), 4)[0])
