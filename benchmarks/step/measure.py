"""All that the step benchmark measures, on every rank."""

from __future__ import annotations

import gc
import os
import warnings
from typing import Any, Final

import torch.distributed as dist

from benchmarks.common.across_ranks import pin_to_core
from benchmarks.common.links import bytes_sent_by_node
from benchmarks.step.breakdown import (
    control_fraction,
    phases_ms,
    spans_of_steps,
    split_exchange_seconds,
    weight_phases_fraction,
    write_chrome_trace,
)
from benchmarks.step.comparison import compare_adapting, compare_systems, prepare
from benchmarks.step.effort import Plan
from benchmarks.step.exchanges import check_bytes, compare_with_paper
from benchmarks.step.systems import FROZEN, OURS, PACKED
from benchmarks.step.update import time_update

# Of a collective: the other ranks wait in one while rank 0 times the update alone.
TIMEOUT_S: Final = 3600


def measure(plan: Plan) -> dict[str, Any]:
    """All measurements, by the result's keys. Every rank calls it; rank 0's is the result."""
    rank = int(os.environ["RANK"])
    link_bytes = None
    if plan.links is not None:
        plan.links.join(rank, TIMEOUT_S)
        # One rank of a node reads what all of them have sent.
        link_bytes = bytes_sent_by_node if rank % plan.links.ranks_per_node == 0 else lambda: 0
    pin_to_core()
    # Other systems' warnings are not ours to fix.
    warnings.simplefilter("ignore")
    ours, losses = prepare(OURS, plan.workload, None)
    results: dict[str, Any] = {
        "systems": compare_systems(ours, losses, plan.workload, plan.systems, plan.effort, link_bytes),
        **_measure_adapting(plan, losses),
    }
    steps = spans_of_steps(ours, plan.effort.repeats)
    sizes = plan.workload.sizes
    split_seconds = sizes.layers * split_exchange_seconds(sizes.experts, plan.effort.repeats)
    results |= {
        "losses": losses,
        "phases_ms": phases_ms(steps),
        "weight_phases_fraction": weight_phases_fraction(steps),
        "control_fraction": control_fraction(steps, split_seconds),
        "split_exchanges_ms": 1e3 * split_seconds,
    }
    write_chrome_trace(ours, plan.chrome_trace)
    results["paper"] = compare_with_paper(ours, plan.effort.repeats)
    results["update"] = time_update(ours, plan.effort.repeats)
    dist.barrier()
    return results


def _measure_adapting(plan: Plan, losses: list[float]) -> dict[str, Any]:
    """Two alike that fill every slot: their bytes are equal whatever their placements are."""
    adapting, _ = prepare(PACKED, plan.workload, losses)
    frozen, _ = prepare(FROZEN, plan.workload, losses)
    results = {
        **compare_adapting((adapting, frozen), plan.effort),
        "bytes": check_bytes(adapting, plan.effort.repeats),
    }
    del adapting, frozen
    gc.collect()
    return results
