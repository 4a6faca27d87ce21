"""What Muon's need of whole matrices costs on the wire, in two ways, replayed without processes from seeded scenarios.

python -m benchmarks.placement.whole_matrices

Rows: every rank owns rows of every matrix, as for all optimizers. Each step the momentum's rows go to the rank that
orthogonalises the matrix, and the result comes back, both in bfloat16. Matrices: each of an expert's gate, up and down
belongs to one rank, matrix n to rank n modulo W, so gradients are collected there, weights are distributed from there,
and nothing else is sent. Policy `balanced`, default slots, gradients and weights on the wire in float32 or bfloat16.

total      bytes of all ranks and a step, by way, over those of one expert's weights in float32
busiest    the most that one rank sends or receives in each exchange, added up over the exchanges, in the same unit
*_ratio    matrices over rows: below 1 it is cheaper to cut over matrices

Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise
from typing import Any, Final

import numpy as np

from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from swiftmoe_lightning.analysis import SCENARIOS, ScenarioOptions, make_scenario
from swiftmoe_lightning.analysis.replay import Rules, replayed_loads
from swiftmoe_lightning.placement import Placement, make_policy

# Ranks, experts.
SIZES: Final = ((8, 8), (8, 64), (16, 64), (64, 64), (64, 128))
_WIRES: Final = {"float32": 1.0, "bfloat16": 0.5}
_KINDS: Final = 3


def exchanged(send_WW: np.ndarray) -> tuple[float, float]:
    """Total, and the most that one rank sends or receives, of [W, W] from rank (row) to rank (column)."""
    send_WW = send_WW * (1 - np.eye(len(send_WW)))
    return float(send_WW.sum()), float(max(send_WW.sum(0).max(), send_WW.sum(1).max()))


def by_rows(before: Placement, after: Placement, wire: float) -> tuple[float, float]:
    """Total and busiest of a layer's step, with rows cut over the ranks."""
    num_ranks, ones_W = before.world_size, np.ones(before.world_size)
    collect_WW = wire * np.outer(before.num_pairs_W, ones_W) / num_ranks
    distribute_WW = wire * np.outer(ones_W, after.num_pairs_W) / num_ranks
    whole_WW = np.full((num_ranks, num_ranks), 0.5 * before.num_experts / num_ranks**2)
    return _added(collect_WW, distribute_WW, whole_WW, whole_WW)


def by_matrices(before: Placement, after: Placement, wire: float) -> tuple[float, float]:
    """Total and busiest of a layer's step, with each matrix on one rank."""
    num_ranks, num_experts = before.world_size, before.num_experts
    owner_M = np.arange(_KINDS * num_experts) % num_ranks
    owned_EW = np.zeros((num_experts, num_ranks))
    np.add.at(owned_EW, (np.arange(_KINDS * num_experts) // _KINDS, owner_M), 1 / _KINDS)
    hosts_before_WE, hosts_after_WE = (_hosts(placement) for placement in (before, after))
    return _added(wire * hosts_before_WE @ owned_EW, wire * (hosts_after_WE @ owned_EW).T)


def _hosts(placement: Placement) -> np.ndarray:
    hosts_WE = np.zeros((placement.world_size, placement.num_experts))
    hosts_WE[placement.pair_rank_P, placement.pair_expert_P] = 1
    return hosts_WE


def _added(*exchanges: np.ndarray) -> tuple[float, float]:
    total, busiest = np.sum([exchanged(send_WW) for send_WW in exchanges], axis=0)
    return float(total), float(busiest)


def measure(scenario: str, num_ranks: int, num_experts: int, num_steps: int, seed: int) -> dict[str, Any]:
    """One row of the result."""
    options = ScenarioOptions(
        seed=seed, num_steps=num_steps, num_layers=1, num_ranks=num_ranks, num_experts=num_experts
    )
    slots = max(-(-5 * num_experts // (4 * num_ranks)), -(-num_experts // num_ranks) + 1)
    popularity_ULE = make_scenario(scenario, options).popularity_ULE
    loads = replayed_loads(popularity_ULE, make_policy("balanced", num_ranks, slots), Rules())
    placements = [step[0].placement for step in islice(loads, num_steps)]
    row: dict[str, Any] = {"scenario": scenario, "ranks": num_ranks, "experts": num_experts, "slots_per_rank": slots}
    for wire, size in _WIRES.items():
        rows, matrices = (
            np.mean([way(before, after, size) for before, after in pairwise(placements)], axis=0)
            for way in (by_rows, by_matrices)
        )
        row[wire] = {
            "rows": {"total": rows[0], "busiest": rows[1]},
            "matrices": {"total": matrices[0], "busiest": matrices[1]},
            "total_ratio": matrices[0] / rows[0],
            "busiest_ratio": matrices[1] / rows[1],
        }
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("placement.whole_matrices", __doc__)
    parser.set_defaults(name="placement_whole_matrices")
    parser.add_argument("--steps", type=int, default=60, help="of each scenario")
    parser.add_argument("--seed", type=int, default=ScenarioOptions.seed, help="of all draws")
    arguments = parser.parse_args(argv)
    provenance = collect_provenance()
    rows = [measure(name, *size, arguments.steps, arguments.seed) for size in SIZES for name in SCENARIOS]
    print(f"{'scenario':12}{'ranks':>6}{'experts':>8}   total / busiest rank, matrices over rows: float32, bfloat16")
    for row in rows:
        ratios = "   ".join(f"{row[wire]['total_ratio']:.2f} / {row[wire]['busiest_ratio']:.2f}" for wire in _WIRES)
        print(f"{row['scenario']:12}{row['ranks']:6}{row['experts']:8}   {ratios}")
    print(f"written to {write_result(arguments.name, provenance, {'rows': rows})}")


if __name__ == "__main__":
    main()
