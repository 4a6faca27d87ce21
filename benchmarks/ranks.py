"""Run a benchmark on W gloo ranks of one machine."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any) -> Any:
    """Call module-level `fn(*args)` in `world_size` processes of one thread each; returns rank 0's JSON-able result."""
    with TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (world_size, folder, fn, args), world_size)
        return json.loads(Path(folder, "result.json").read_text())


def slowest(values: list[float]) -> list[float]:
    """Element by element, the largest of all ranks' values: ranks wait for each other. A collective."""
    highest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest.tolist()


def total(values: list[float]) -> list[float]:
    """Element by element, the sum over ranks. A collective."""
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


def _rank_main(rank: int, world_size: int, folder: str, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    result = fn(*args)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()
    # What still holds the group must go before the interpreter does (see ExpertGroup).
    gc.collect()
