import pytest
import torch

from swiftmoe_lightning.ops import regroup, sort_assignments
from tests.ops.cases import DEVICE, fenced_memory


def table(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.usefixtures("each_backend")
def test_segments_move_and_keep_their_order_inside():
    # Rows 0..2, none, 3 and 4..5 go behind, nowhere, and to the front; the last assignment has no row.
    rows_TK = torch.tensor([[4, 0], [1, 5], [2, 3], [-1, -1]], dtype=torch.int32)
    assignment_R, moved_TK = regroup(rows_TK, table(3, 3, 4, 6), table(3, 0, -1, -4), 6)
    assert moved_TK.tolist() == [[0, 3], [4, 1], [5, 2], [-1, -1]]
    assert assignment_R.tolist() == [0, 3, 5, 1, 2, 4]
    assert assignment_R.dtype == moved_TK.dtype == torch.int32


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("num_segments", [1, 2, 3, 64, 100])
@pytest.mark.parametrize("num_assignments", [0, 1, 255, 700])
def test_it_is_the_sort_by_the_new_order_of_groups(num_segments, num_assignments):
    generator = torch.Generator().manual_seed(num_segments + num_assignments)
    # Group G is unassigned.
    group_N = torch.randint(num_segments + 1, (num_assignments,), generator=generator, device="cpu").to(DEVICE)
    place_G = torch.randperm(num_segments, generator=generator, device="cpu").to(DEVICE)
    by_group = sort_assignments(group_N.unsqueeze(1), num_segments)
    place_N = torch.cat([place_G, torch.tensor([num_segments])])[group_N]
    expected = sort_assignments(place_N.unsqueeze(1), num_segments)
    starts_G = expected.ends_G - expected.counts_G
    shifts_G = starts_G[place_G] - (by_group.ends_G - by_group.counts_G)
    num_rows = int(by_group.ends_G[-1])
    with fenced_memory():
        assignment_R, moved_TK = regroup(by_group.rows_TK, by_group.ends_G, shifts_G, num_rows)
    assert torch.equal(assignment_R, expected.assignment_R[:num_rows])
    assert torch.equal(moved_TK, expected.rows_TK)
