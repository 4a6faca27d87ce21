"""Host time of one layer's plans on one core, from 8 ranks to 4,096, as what one rank does for itself.

python -m benchmarks.placement.host_time

256 experts, which each rank's 32,768 assignments draw with chances as 1 / n^0.6; default slots, `balanced` placements
made from another step's counts, the token split `balanced`, dropless. Microseconds of processor time, for nodes of one
rank and of 8:

split           a forward's `plan_dispatch` and its part for one rank, under a placement that was used before
whole_tables    the same from prefix sums over all ranks and experts, which `tests/placement/whole_tables.py` keeps;
                measured in turns with `split`
ratio           of `split` over `whole_tables`
first_split     `split` under a new placement, as in the first forward after a step
transfer        a step's `plan_collection` and `plan_distribution`, and one rank's splits of both

Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from benchmarks.common.command_line import command_line
from benchmarks.common.interleaved import cpu_seconds_of, interleaved
from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.common.spread import paired_ratio, spread
from swiftmoe_lightning.placement import (
    Forecast,
    Placement,
    RankPlan,
    make_policy,
    plan_collection,
    plan_dispatch,
    plan_distribution,
)
from tests.placement.whole_tables import WholeTables

RANKS: Final = (8, 64, 256, 1024, 4096)
NODES: Final = (1, 8)
_NUM_EXPERTS, _ASSIGNMENTS, _ZIPF = 256, 32_768, 0.6
# Gated experts with dim 2048 and hidden dim 768, as of Qwen3-30B-A3B.
_ROW_ELEMENTS: Final = ((1536, 2048), (2048, 768))
_WARM_UP: Final = 5


def measure(num_ranks: int, ranks_per_node: int, pairs: int) -> dict[str, Any]:
    """One row of the result.

    Args:
        num_ranks: W.
        ranks_per_node: neighbours on a node.
        pairs: how many pairs of two measurements each.
    """
    rng = np.random.default_rng(num_ranks)
    chances_E = rng.permutation(np.arange(1, _NUM_EXPERTS + 1) ** -_ZIPF)
    before_WE, counts_WE = rng.multinomial(_ASSIGNMENTS, chances_E / chances_E.sum(), size=(2, num_ranks))
    slots = max(-(-5 * _NUM_EXPERTS // (4 * num_ranks)), -(-_NUM_EXPERTS // num_ranks) + 1)
    (placement,) = make_policy("balanced", num_ranks, slots).place(Forecast.of(before_WE.sum(0)[None]))
    # Neither the first rank, which has no ranks below it, nor the last one.
    rank = 3 * num_ranks // 8

    def split(placement: Placement = placement) -> RankPlan:
        return plan_dispatch(counts_WE, placement, ranks_per_node=ranks_per_node).for_rank(rank)

    def first_split() -> float:
        fresh = Placement(placement.slot_to_expert_S, _NUM_EXPERTS, num_ranks)
        return cpu_seconds_of(lambda: split(fresh))

    def whole_tables() -> float:
        with patch("swiftmoe_lightning.placement.token_split.Routes", WholeTables):
            return cpu_seconds_of(split)

    def transfer() -> None:
        for plan in (plan_collection(placement, _ROW_ELEMENTS), plan_distribution(placement, _ROW_ELEMENTS)):
            plan.send_splits(rank)
            plan.receive_splits(rank)

    ours, theirs = interleaved(lambda: cpu_seconds_of(split), whole_tables, pairs, _WARM_UP)
    return {
        "ranks": num_ranks,
        "ranks_per_node": ranks_per_node,
        "slots_per_rank": slots,
        "pairs": placement.num_pairs,
        "split_us": spread(1e6 * np.array(ours)),
        "whole_tables_us": spread(1e6 * np.array(theirs)),
        "ratio": paired_ratio(ours, theirs),
        "first_split_us": _microseconds(first_split, 2 * pairs),
        "transfer_us": _microseconds(lambda: cpu_seconds_of(transfer), 2 * pairs),
    }


def _microseconds(timed: Callable[[], float], calls: int) -> dict[str, float]:
    times = [timed() for _ in range(_WARM_UP + calls)]
    return spread(1e6 * np.array(times[_WARM_UP:]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("placement.host_time", __doc__)
    parser.add_argument("--pairs", type=int, default=100, help="of two measurements each, of every number")
    options = parser.parse_args(arguments)
    provenance = collect_provenance()
    rows = []
    for num_ranks in RANKS:
        for ranks_per_node in NODES:
            rows.append(measure(num_ranks, ranks_per_node, options.pairs))
            split, plain = rows[-1]["split_us"]["median"], rows[-1]["whole_tables_us"]["median"]
            print(f"{num_ranks} ranks, {ranks_per_node} a node: {split:.0f} us, whole tables {plain:.0f}", flush=True)
    print(f"written to {write_result(options.name, provenance, {'rows': rows})}")


if __name__ == "__main__":
    main()
