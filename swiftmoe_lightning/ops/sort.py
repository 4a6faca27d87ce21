"""Sorts assignments by group.

T tokens, K top-k, N = T * K assignments, G groups, R rows. An assignment is a token with one of its K experts; number
t * K + k is token t's k-th. A row holds one assignment.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

from typing import NamedTuple

import torch
from torch import Tensor

from swiftmoe_lightning.ops.backend import needs_operator, uses_triton


class SortedAssignments(NamedTuple):
    """Which assignment is in which row. Rows are sorted by group: an expert, a slot, or a (rank, expert) pair.

    `sort_assignments` makes all four int32; operations take the first two as int64, too.

    Attributes:
        assignment_R: [R], the assignment in each row, -1 if the row is unassigned.
        rows_TK: [T, K], its inverse: the row of each assignment, -1 if it has none.
        counts_G: [G], rows of each group.
        ends_G: [G], the end of each group's rows. Rows from ends_G[-1] on are unassigned.
    """

    assignment_R: Tensor
    rows_TK: Tensor
    counts_G: Tensor
    ends_G: Tensor


def sort_assignments(group_TK: Tensor, num_groups: int) -> SortedAssignments:
    """Sort assignments by group, keeping the order inside one.

    Only the device knows how many assignments have a group, and the CPU does not wait for it: there are R = N rows, and
    those behind the last group's end are unassigned (-1).

    Args:
        group_TK: [T, K] int32 or int64, the group of each assignment; outside 0..G-1 it is unassigned.
        num_groups: G.
    """
    sort = _sort if needs_operator(group_TK) else _run_sort
    return SortedAssignments(*sort(group_TK, num_groups))


def eager_sort(group_TK: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `SortedAssignments`, without a wait for a GPU."""
    group_N = group_TK.flatten()
    is_assigned = (group_N >= 0) & (group_N < num_groups)
    group_N = torch.where(is_assigned, group_N, num_groups).to(torch.int64)
    order_N = torch.argsort(group_N, stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    counts_G = torch.zeros(num_groups + 1, dtype=torch.int64, device=group_N.device)
    counts_G = counts_G.scatter_add_(0, group_N, torch.ones_like(group_N))[:-1]
    assignment_N = torch.where(is_assigned[order_N], order_N, -1)
    rows_TK = torch.where(is_assigned, place_N, -1).view(group_TK.shape)
    return assignment_N.int(), rows_TK.int(), counts_G.int(), counts_G.cumsum(0).int()


def _run_sort(group_TK: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if uses_triton(group_TK):
        from swiftmoe_lightning.ops.triton import sort as kernels

        return kernels.sort(group_TK, num_groups)
    return eager_sort(group_TK, num_groups)


_sort = torch.library.custom_op("swiftmoe::sort", _run_sort, mutates_args=())


@_sort.register_fake
def _(group_TK: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        group_TK.new_empty(group_TK.numel(), dtype=torch.int32),
        group_TK.new_empty(group_TK.shape, dtype=torch.int32),
        group_TK.new_empty(num_groups, dtype=torch.int32),
        group_TK.new_empty(num_groups, dtype=torch.int32),
    )
