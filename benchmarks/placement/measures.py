"""What the placement benchmark measures: replays of traces, planning times, and plans for another text domain.

W ranks, U text domains, L layers, E experts, s slots of a rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from benchmarks.common.interleaved import seconds_of
from benchmarks.common.spread import spread
from swiftmoe_lightning.analysis import CANDIDATES, Machine, PlanOptions, Trace, make_plan
from swiftmoe_lightning.placement import Capacity, Forecast, Placement, make_policy, plan_dispatch

SLOTS: Final = (2, 4, 8)
CAPACITY_FACTORS: Final = (1.0, 1.25, None)
_KEYS: Final = (
    "dropped",
    "imbalance",
    "bytes_gradients",
    "bytes_weights",
    "bytes_paper",
    "bytes_state_moved",
    "pairs",
    "replicas_moved",
    "planning_seconds",
    "achieved",
    "losses",
    "capacity_per",
)
_FEWEST_CALLS, _MOST_CALLS = 10, 2000
# (policy, token split, capacity_per), as in `swiftmoe plan`.
_RULES: Final = (("balanced", "balanced", "rank"), ("packed", "balanced", "rank"), ("symi", "uniform", "slot"))
# (ranks, slots of a rank)
_MACHINES: Final = ((8, 12), (16, 6), (8, 9))


def compare_policies(
    name: str,
    trace: Trace,
    num_ranks: int,
    slots_per_rank: Sequence[int] = SLOTS,
    capacity_factors: Sequence[float | None] = CAPACITY_FACTORS,
) -> list[dict[str, Any]]:
    """Every policy on one trace: a row for each number of slots and capacity factor."""
    rows = []
    for slots in slots_per_rank:
        machine = Machine(num_ranks=num_ranks, slots_per_rank=slots)
        for factor in capacity_factors:
            plan = make_plan(trace, machine, PlanOptions(policies=tuple(CANDIDATES), capacity_factor=factor)).as_json()
            print(f"{name}: {slots} slots, capacity {factor or 'none'}", flush=True)
            rows.append(
                {
                    "trace": name,
                    "slots_per_rank": slots,
                    "capacity_factor": factor,
                    "bounds": plan["bounds"],
                    "policies": {
                        policy: {key: values[key] for key in _KEYS} for policy, values in plan["policies"].items()
                    },
                }
            )
    return rows


def time_planning(seconds: float) -> dict[str, Any]:
    """Microseconds on one core: one layer's token split at W = 64, E = 64, s = 4 (shares, drops, and one rank's side
    of it), and placements of 60 layers at W = 2048, E = 256, s = 2.

    Args:
        seconds: how long each of them is called again and again, but for ten calls or more.
    """
    rng = np.random.default_rng(0)
    counts_WE = rng.multinomial(4096, rng.dirichlet(np.full(64, 0.5)), size=64)
    (placement,) = make_policy("balanced", 64, 4).place(Forecast.of(counts_WE.sum(0)[None]))

    def split(ranks_per_node: int) -> Callable[[], object]:
        return lambda: plan_dispatch(counts_WE, placement, "balanced", Capacity(1.0), ranks_per_node).for_rank(3)

    def place(name: str) -> Callable[[], object]:
        policy = make_policy(name, 2048, 2)
        return lambda: policy.place(Forecast.of(popularity_LE))

    popularity_LE = (rng.dirichlet(np.full(256, 0.5), size=60) * 1e6).astype(np.int64)
    plans = {"split": split(1), "split_nodes_of_8": split(8)}
    for name in ("balanced", "packed", "symi"):
        plans[f"place_{name}"] = place(name)
    return {f"{name}_us": spread(_microseconds(plan, seconds)) for name, plan in plans.items()}


def _microseconds(action: Callable[[], object], seconds: float) -> list[float]:
    action()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < _FEWEST_CALLS or (time.perf_counter() < end and len(times) < _MOST_CALLS):
        times.append(1e6 * seconds_of(action))
    return times


def switch_domains(popularity_ULE: np.ndarray) -> dict[str, Any]:
    """Share of assignments over a capacity factor of 1 when a plan for one domain meets another, all pairs.

    Policies have their own budgets, as in `swiftmoe plan`. "uniform" is `static`: with budgets per slot, the paper's
    way, and with our pooled budgets and split, which no other static placement has.

    Args:
        popularity_ULE: [U, L, E] the popularity of each domain.

    Returns:
        "rows": for each policy and machine its mean and worst share, and both of them beside the uniform placement's.
    """
    num_domains, _, num_experts = popularity_ULE.shape
    rows = []
    for num_ranks, slots in _MACHINES:
        uniform = make_policy("static", num_ranks, slots).place(Forecast.of(popularity_ULE[0]))
        for name, token_split, capacity_per in _RULES:
            dropped, uniform_slot, uniform_pooled = [], [], []
            for planned in range(num_domains):
                placements = make_policy(name, num_ranks, slots).place(Forecast.of(popularity_ULE[planned]))
                for run in set(range(num_domains)) - {planned}:
                    popularity_LE = popularity_ULE[run]
                    dropped.append(_dropped(popularity_LE, placements, token_split, capacity_per))
                    uniform_slot.append(_dropped(popularity_LE, uniform, "uniform", "slot"))
                    uniform_pooled.append(_dropped(popularity_LE, uniform, "balanced", "rank"))
            rows.append(
                {
                    "policy": name,
                    "ranks": num_ranks,
                    "slots_per_rank": slots,
                    "experts": num_experts,
                    "dropped_mean": float(np.mean(dropped)),
                    "dropped_worst": float(np.max(dropped)),
                    "uniform_slot_mean": float(np.mean(uniform_slot)),
                    "worst_over_uniform_slot": float(np.max(np.array(dropped) - uniform_slot)),
                    "uniform_pooled_mean": float(np.mean(uniform_pooled)),
                    "worst_over_uniform_pooled": float(np.max(np.array(dropped) - uniform_pooled)),
                }
            )
    return {"rows": rows}


def _dropped(popularity_LE: np.ndarray, placements: Sequence[Placement], token_split: str, capacity_per: str) -> float:
    """Share of assignments that are dropped, mean over layers; as if one rank had all tokens."""
    plans = [
        plan_dispatch(popularity_E[None], placement, token_split, Capacity(1.0, capacity_per))
        for popularity_E, placement in zip(popularity_LE, placements, strict=True)
    ]
    return float(np.mean([plan.num_dropped_tokens / plan.share_P.sum() for plan in plans]))
