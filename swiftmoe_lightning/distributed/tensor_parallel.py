"""Tokens that several ranks hold alike, as under tensor parallelism: each takes a share, and all gather the results.

T tokens, n ranks that hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from swiftmoe_lightning.distributed.group import RankGroup


# torch.compile cannot trace a collective in a backward.
@torch.compiler.disable
def take_share(rows_T: Tensor, ranks: RankGroup) -> Tensor:
    """This rank's rows of [T, ...], which all ranks hold. Backward gathers the gradients of all rows."""
    return _TakeShare.apply(rows_T, ranks) if rows_T.is_floating_point() else _own(rows_T, ranks)


@torch.compiler.disable
def gather_shares(rows: Tensor, num_rows: int, ranks: RankGroup) -> Tensor:
    """[T, ...] of the rows that each rank has computed, T = `num_rows`.

    Backward takes this rank's rows of the gradient, which must be the same on all ranks, as it is where they go
    on with the same computation.
    """
    return _GatherShares.apply(rows, num_rows, ranks)


class _TakeShare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_T: Tensor, ranks: RankGroup) -> Tensor:
        ctx.num_rows, ctx.ranks = len(rows_T), ranks
        return _own(rows_T, ranks).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather(grad, ctx.num_rows, ctx.ranks), None


class _GatherShares(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, num_rows: int, ranks: RankGroup) -> Tensor:
        ctx.ranks = ranks
        return _gather(rows, num_rows, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None]:
        return _own(grad_T, ctx.ranks).contiguous(), None, None


def _own(rows_T: Tensor, ranks: RankGroup) -> Tensor:
    return rows_T[ranks.own_rows(len(rows_T))]


def _gather(rows: Tensor, num_rows: int, ranks: RankGroup) -> Tensor:
    if num_rows == 0:
        return rows
    # Shares may differ in length, and an all-gather takes equal ones.
    longest = -(-num_rows // ranks.size)
    send = rows.new_zeros(longest, *rows.shape[1:])
    send[: len(rows)] = rows
    return ranks.all_gather(send.flatten()).view(-1, *rows.shape[1:])[:num_rows]
