"""What all ranks measured, element by element."""

from __future__ import annotations

import torch
import torch.distributed as dist


def slowest(values: list[float]) -> list[float]:
    """The largest of all ranks' values: ranks wait for each other. A collective."""
    return _reduced(values, dist.ReduceOp.MAX)


def total(values: list[float]) -> list[float]:
    """The sum over ranks. A collective."""
    return _reduced(values, dist.ReduceOp.SUM)


def _reduced(values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, operation)
    return reduced.tolist()
