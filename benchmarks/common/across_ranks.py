"""What all ranks measured, element by element, each on a core of its own."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist


def slowest(values: list[float]) -> list[float]:
    """The largest of all ranks' values: ranks wait for each other. A collective."""
    return _reduced(values, dist.ReduceOp.MAX)


def total(values: list[float]) -> list[float]:
    """The sum over ranks. A collective."""
    return _reduced(values, dist.ReduceOp.SUM)


def least(values: list[float]) -> list[float]:
    """The smallest of all ranks' values: the last to come to a collective does not wait in it. A collective."""
    return _reduced(values, dist.ReduceOp.MIN)


def pin_to_core() -> None:
    """Keep this rank on a core of its own, where there are as many as ranks. Call it before threads start."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) >= dist.get_world_size():
            os.sched_setaffinity(0, {cores[dist.get_rank()]})


def _reduced(values: list[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    reduced = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(reduced, operation)
    return reduced.tolist()
