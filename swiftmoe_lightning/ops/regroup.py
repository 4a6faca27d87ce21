"""Moves whole segments of sorted rows, in place of a second sort.

T tokens, K top-k, N = T * K assignments, V segments (runs of neighbouring rows), R rows. See `sort.py` for assignments.
"""

# No `from __future__ import annotations`: torch reads an operator's schema off its annotations.

import torch
from torch import Tensor

from swiftmoe_lightning.ops.backend import needs_operator, uses_triton


def regroup(rows_TK: Tensor, ends_V: Tensor, shifts_V: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Move each segment's rows.

    Args:
        rows_TK: [T, K] int32, the row of each assignment, below `ends_V[-1]`; -1 if it has none.
        ends_V: [V] int32, the end of each segment's rows; V is 1 or more.
        shifts_V: [V] int32, by how many rows each segment moves. Segments fill the rows 0..R-1 again.
        num_rows: R, the assignments that have a row. The host knows it.

    Returns:
        ([R] int32, the assignment in each row; [T, K] int32, the row of each assignment, -1 if it has none).
    """
    move = _regroup if needs_operator(rows_TK) else _run_regroup
    assignment_R, moved_TK = move(rows_TK, ends_V, shifts_V, num_rows)
    return assignment_R, moved_TK


def eager_regroup(rows_TK: Tensor, ends_V: Tensor, shifts_V: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """`regroup`, without a wait for a GPU."""
    segment_TK = torch.searchsorted(ends_V, rows_TK, right=True).clamp_(max=len(ends_V) - 1)
    moved_TK = torch.where(rows_TK < 0, -1, rows_TK + shifts_V[segment_TK])
    # One more place, dropped at the end, for assignments without a row.
    place_N = torch.where(moved_TK < 0, num_rows, moved_TK).flatten().to(torch.int64)
    assignment_R = torch.empty(num_rows + 1, dtype=torch.int32, device=rows_TK.device)
    assignment_R[place_N] = torch.arange(len(place_N), dtype=torch.int32, device=rows_TK.device)
    return assignment_R[:-1], moved_TK


def _run_regroup(rows_TK: Tensor, ends_V: Tensor, shifts_V: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    if uses_triton(rows_TK):
        from swiftmoe_lightning.ops.triton import regroup as kernels

        return kernels.regroup(rows_TK, ends_V, shifts_V, num_rows)
    return eager_regroup(rows_TK, ends_V, shifts_V, num_rows)


_regroup = torch.library.custom_op("swiftmoe::regroup", _run_regroup, mutates_args=())


@_regroup.register_fake
def _(rows_TK: Tensor, ends_V: Tensor, shifts_V: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    return rows_TK.new_empty(num_rows), rows_TK.new_empty(rows_TK.shape)
