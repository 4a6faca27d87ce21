"""The matrices of a parameter, as Muon updates them: their momentum is read by rows, and their rows are written.

E experts, r rows of a tensor that this rank has, c columns, n matrices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from swiftmoe_lightning.distributed import CutMatrices, gradient_shard, is_sharded, local_shard, rows_by_rank
from swiftmoe_lightning.placement import MatrixStack, part_of_rows


@dataclass(frozen=True)
class RowCut:
    """How a parameter's rows are cut over ranks.

    Attributes:
        process_group: the ranks; None where this one has all rows.
        rows_W: each rank's rows.
        own: this rank's number in the group.
    """

    process_group: dist.ProcessGroup | None
    rows_W: Sequence[range]
    own: int

    @classmethod
    def of(cls, parameter: Tensor) -> RowCut:
        """The cut of a matrix [rows, columns], or of experts [E, rows, columns].

        Raises:
            ValueError: for a DTensor that is cut otherwise.
        """
        if not isinstance(parameter, DTensor):
            return cls(None, [range(parameter.shape[-2])], 0)
        found = rows_by_rank(parameter, parameter.dim() - 2)
        if found is None:
            raise ValueError(
                f"Muon takes matrices that are whole or cut by rows over one axis of ranks, and a parameter of shape "
                f"{list(parameter.shape)} is cut as {parameter.placements} over {parameter.device_mesh.shape} ranks "
                "(biases of experts, and tensor-parallel weights, are). Put it into a group with use_muon=False. "
                "(FAQ: muon-on-experts)"
            )
        return cls(found[0], found[1], found[0].rank())


def gradient_of(parameter: Tensor) -> Tensor:
    """The gradient, or this rank's shard of it."""
    if is_sharded(parameter):
        return gradient_shard(parameter)
    assert parameter.grad is not None
    return parameter.grad


def matrices_of(
    parameter: Tensor, average: Tensor, settings: Mapping[str, Any], cut: RowCut, device: torch.device
) -> list[CutMatrices]:
    """A stack of matrices for each of an expert's, or one with one matrix for a 2-D parameter.

    Args:
        parameter: 2-D or 3-D, with a gradient.
        average: its gradients' moving average, of this rank's rows.
        settings: its parameter group.
        cut: its own.
        device: to which rows are read, and from which they are written.
    """
    tensors = [t.unsqueeze(0) if t.dim() == 2 else t for t in (local_shard(parameter), gradient_of(parameter), average)]
    layout, num_rows, num_columns = settings["experts"] or "matrix", *parameter.shape[-2:]
    stacks = []
    for part in range(1 if layout == "matrix" else 2):
        rows, columns = slice(None), slice(None)
        rows_W, height, width = cut.rows_W, num_rows, num_columns
        if settings["transposed"]:
            columns, of_part = part_of_rows(0, num_columns, num_columns, layout, part)
            width = len(of_part)
        else:
            pieces = [part_of_rows(rows.start, rows.stop, num_rows, layout, part) for rows in cut.rows_W]
            rows, rows_W = pieces[cut.own][0], [of_part for _, of_part in pieces]
            height = sum(map(len, rows_W))
        out, inner = (width, height) if settings["transposed"] else (height, width)
        own = _OwnRows(*(tensor[:, rows, columns] for tensor in tensors))
        update = _RowUpdate(own, settings, float(settings["lr"]) * _adjustment(settings, out, inner), device)
        stack = MatrixStack(len(tensors[0]), height, width)
        stacks.append(CutMatrices(stack, rows_W, update.read, update.write))
    return stacks


def _adjustment(settings: Mapping[str, Any], out: int, inner: int) -> float:
    """The factor of the learning rate of matrices of `out` rows and `inner` columns."""
    if settings["adjust_lr_fn"] == "match_rms_adamw":
        return 0.2 * math.sqrt(max(out, inner))
    return math.sqrt(max(1, out / inner))


class _OwnRows(NamedTuple):
    """This rank's rows [E, r, c] of matrices, of their gradients and of the gradients' moving averages."""

    weights: Tensor
    gradient: Tensor
    average: Tensor


@dataclass(frozen=True, eq=False)
class _RowUpdate:
    own: _OwnRows
    settings: Mapping[str, Any]
    learning_rate: float
    device: torch.device

    def read(self, first: int, stop: int) -> Tensor:
        """[n, r, c] bfloat16, what is to be orthogonalised of the matrices first to stop - 1."""
        average, settings = self.own.average[first:stop], self.settings
        update = self.own.gradient[first:stop].lerp(average, settings["momentum"]) if settings["nesterov"] else average
        # In one order of memory, by which sums round alike on any number of ranks.
        return update.to(self.device, torch.bfloat16).contiguous()

    def write(self, first: int, stop: int, orthogonal: Tensor) -> None:
        """Update the matrices first to stop - 1 by these rows, [n, r, c] bfloat16."""
        weights, settings = self.own.weights[first:stop], self.settings
        weights.mul_(1 - float(settings["lr"]) * settings["weight_decay"])
        weights.add_(orthogonal.to(weights.device), alpha=-self.learning_rate)
