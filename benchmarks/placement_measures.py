"""What the placement benchmark measures beside replays: planning times, and plans for another text domain."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.spread import spread
from swiftmoe_lightning.analysis import read_trace
from swiftmoe_lightning.placement import Capacity, Forecast, make_policy, plan_dispatch


def time_planning() -> dict[str, Any]:
    """Microseconds on one core: one layer's token split at W = 64, E = 64, s = 4 (shares, drops, and one rank's side
    of it), and placements of 60 layers at W = 2048, E = 256, s = 2."""
    rng = np.random.default_rng(0)
    counts_WE = rng.multinomial(4096, rng.dirichlet(np.full(64, 0.5)), size=64)
    (placement,) = make_policy("balanced", 64, 4).place(Forecast.of(counts_WE.sum(0)[None]))

    def split(ranks_per_node: int) -> Callable[[], object]:
        return lambda: plan_dispatch(counts_WE, placement, "balanced", Capacity(1.0), ranks_per_node).for_rank(3)

    popularity_LE = rng.dirichlet(np.full(256, 0.5), size=60) * 1e6
    found = {"split": split(1), "split_nodes_of_8": split(8)}
    for name in ("balanced", "packed", "symi"):
        policy = make_policy(name, 2048, 2)
        found[f"place_{name}"] = lambda policy=policy: policy.place(Forecast.of(popularity_LE.astype(np.int64)))
    return {f"{name}_us": spread(_microseconds(action)) for name, action in found.items()}


def _microseconds(action: Callable[[], object]) -> list[float]:
    action()
    times = []
    end = time.perf_counter() + 3
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 2000):
        begin = time.perf_counter()
        action()
        times.append(1e6 * (time.perf_counter() - begin))
    return times


def switch_domains(path: Path) -> dict[str, Any]:
    """Share of assignments over a capacity factor of 1 when a plan for one domain meets another, all pairs.

    Policies have their own budgets, as in `swiftmoe plan`. "uniform" is `static`: judged by slots, the paper's way, and
    with our pooled budgets and split, which no other static placement has.
    """
    popularity_ULE = read_trace(path).popularity_ULE
    num_domains, _, num_experts = popularity_ULE.shape
    rows = []
    for num_ranks, slots in ((8, 12), (16, 6), (8, 9)):
        uniform = make_policy("static", num_ranks, slots).place(Forecast.of(popularity_ULE[0]))
        contenders = [("balanced", "balanced", "rank"), ("packed", "balanced", "rank"), ("symi", "uniform", "slot")]
        for name, split, per in contenders:
            dropped, slot, pooled = [], [], []
            for planned in range(num_domains):
                placements = make_policy(name, num_ranks, slots).place(Forecast.of(popularity_ULE[planned]))
                for run in set(range(num_domains)) - {planned}:
                    popularity_LE = popularity_ULE[run]
                    dropped.append(_dropped(popularity_LE, placements, split, per))
                    slot.append(_dropped(popularity_LE, uniform, "uniform", "slot"))
                    pooled.append(_dropped(popularity_LE, uniform, "balanced", "rank"))
            rows.append(
                {
                    "policy": name,
                    "ranks": num_ranks,
                    "slots_per_rank": slots,
                    "experts": num_experts,
                    "dropped_mean": float(np.mean(dropped)),
                    "dropped_worst": float(np.max(dropped)),
                    "uniform_slot_mean": float(np.mean(slot)),
                    "worst_over_uniform_slot": float(np.max(np.array(dropped) - slot)),
                    "uniform_pooled_mean": float(np.mean(pooled)),
                    "worst_over_uniform_pooled": float(np.max(np.array(dropped) - pooled)),
                }
            )
    return {"rows": rows}


def _dropped(popularity_LE: np.ndarray, placements: Any, split: str, per: str) -> float:
    """Mean over layers."""
    plans = [
        plan_dispatch(popularity_E[None], placement, split, Capacity(1.0, per))
        for popularity_E, placement in zip(popularity_LE, placements, strict=True)
    ]
    return float(np.mean([plan.num_dropped_tokens / plan.share_P.sum() for plan in plans]))
