"""The update alone: a prepared optimizer beside stock AdamW."""

from __future__ import annotations

import time
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.common.spread import paired_ratio, spread
from benchmarks.step.training import TrainingSystem
from swiftmoe_lightning.distributed import local_shard

_WARM_UP: Final = 3


def time_update(system: TrainingSystem, repeats: int) -> dict[str, Any]:
    """`step()` of a prepared AdamW over sharded and dense parameters, without placing and distributing, over that of
    stock AdamW with the same options on plain tensors of the same local shapes, values and gradients. Rank 0 measures;
    the others wait.

    Args:
        system: under our engine; its weights are of no use afterwards.
        repeats: pairs of updates by each optimizer.
    """
    engine = system.engine
    assert engine is not None
    system.forward().backward()
    plain = []
    for parameter in engine.module.parameters():
        copy = nn.Parameter(local_shard(parameter).detach().clone())
        assert parameter.grad is not None
        copy.grad = local_shard(parameter.grad).clone()
        plain.append(copy)
    stock = torch.optim.AdamW(plain, lr=system.optimizer.defaults["lr"], fused=system.optimizer.defaults["fused"])
    prepared_ms: list[tuple[float, float]] = []
    stock_ms: list[tuple[float, float]] = []
    # The update has no communication, so one rank can run it while the others leave the machine idle.
    with patch.object(engine, "after_update", lambda *_: None):
        order = (system.optimizer, prepared_ms), (stock, stock_ms)
        for optimizer, times in (*order, *order[::-1]) * (_WARM_UP + repeats):
            if dist.get_rank() == 0:
                start = time.perf_counter(), time.thread_time()
                optimizer.step()
                times.append((1e3 * (time.perf_counter() - start[0]), 1e3 * (time.thread_time() - start[1])))
    dist.barrier()
    if dist.get_rank():
        return {}
    (prepared_wall, prepared_cpu), (stock_wall, stock_cpu) = (
        np.array(times[2 * _WARM_UP :]).T for times in (prepared_ms, stock_ms)
    )
    return {
        "wall_ratio": paired_ratio(prepared_wall, stock_wall),
        "cpu_ratio": paired_ratio(prepared_cpu, stock_cpu),
        "prepared_cpu_ms": spread(prepared_cpu),
        "stock_cpu_ms": spread(stock_cpu),
        "tensors": len(plain),
        "elements": sum(p.numel() for p in plain),
    }
