"""The exchange of tokens between nodes, at one level and at two, on paper: HierMoE's 32 GPUs, without processes.

python -m benchmarks.placement.two_levels

HierMoE (Lin et al., arXiv 2508.09591) trained Qwen3-30B-A3B and DeepSeek-V3 on 4 nodes of 8 GPUs. It reports exchanges
1.55 - 3.32 times as fast, and steps 1.18 - 1.27 times as fast, as those of Megatron-LM, Tutel and SmartMoE. Here a step
of one MoE layer of these models is planned by the rules of each system, token by token: tokens are drawn (experts
equally popular, or the i-th with a weight of 1 / sqrt(i)), placements made from another draw; the busiest rank counts.
Its links are not known to us, so there are two kinds of clusters. Seconds add up: no overlap.

megatron    an expert on one rank, for good; a row an assignment
dedup       the same; a row a token between nodes
hiermoe     experts swapped by load, a row a token between nodes; moving weights and optimizer state is taken to be free
ours_flat   `balanced`, a row an assignment; weights and gradients are sent in each step, and counted
ours        `balanced`, a row a token between nodes; the same
ours_groups `balanced` in expert groups of one node, which no token leaves: weights and gradients do; the same

exchange_speedup and step_speedup are megatron's seconds over the system's. Writes benchmarks/results/NAME.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np

from benchmarks.common.command_line import command_line
from benchmarks.common.provenance import collect_provenance, write_result
from swiftmoe_lightning.analysis.cluster import Cluster
from swiftmoe_lightning.analysis.cost import busiest_phase
from swiftmoe_lightning.analysis.model_sizes import ModelSizes, read_model
from swiftmoe_lightning.config import SwiftMoEConfig
from swiftmoe_lightning.placement import DispatchPlan, Forecast, Placement, make_policy, plan_dispatch

RANKS: Final = 32
# Assumed: NVLink with 400 Gb/s a rank, and NVLink with 200 Gb/s a node, each with what such GPUs compute in bfloat16.
CLUSTERS: Final = {
    "400 Gb/s a GPU": (Cluster(num_ranks=RANKS), 400e12),
    "200 Gb/s a node": (Cluster(num_ranks=RANKS, node_bytes=200e9, network_bytes=25e9 / 8), 150e12),
}
MODELS: Final = ("qwen3-30b-a3b", "deepseek-v3")
# Exponent of the popularities' law.
ROUTINGS: Final = {"even": 0.0, "skewed": 0.5}
# A row there and back, forward and backward; operations of a parameter and token in both; bytes of bfloat16.
_EXCHANGES: Final = 4
_OPERATIONS: Final = 6
_BYTES: Final = 2
# Of an assignment that travels between nodes at two levels: its pair, its weight, and the weight's gradient.
_LABEL_BYTES: Final = 3 * 4


@dataclass(frozen=True)
class System:
    """How a system places experts and sends tokens.

    Attributes:
        policy: of placement.
        replicates: whether experts have replicas, whose weights and gradients travel in each step.
        two_levels: whether a token travels once to a node.
        groups: whether every node is an expert group, with all experts, that no token leaves.
    """

    policy: str
    replicates: bool
    two_levels: bool
    groups: bool = False


SYSTEMS: Final = {
    "megatron": System("static", replicates=False, two_levels=False),
    "dedup": System("static", replicates=False, two_levels=True),
    "hiermoe": System("swap", replicates=False, two_levels=True),
    "ours_flat": System("balanced", replicates=True, two_levels=False),
    "ours": System("balanced", replicates=True, two_levels=True),
    "ours_groups": System("balanced", replicates=True, two_levels=False, groups=True),
}


def draw(rng: np.random.Generator, log_weight_E: np.ndarray, num_tokens: int, top_k: int) -> np.ndarray:
    """[W, T, K] int64, each token's different experts.

    Args:
        rng: of the draws.
        log_weight_E: [E] float32, logarithms of the experts' weights.
        num_tokens: T of a rank.
        top_k: K.
    """
    ids = []
    for _ in range(RANKS):
        race_TE = log_weight_E + rng.gumbel(size=(num_tokens, len(log_weight_E))).astype(np.float32)
        ids.append(np.argpartition(-race_TE, top_k - 1, axis=1)[:, :top_k])
    return np.stack(ids)


def pairs_of_tokens(ids_TK: np.ndarray, sent_P: np.ndarray, placement: Placement) -> np.ndarray:
    """[T, K] int64, the (rank, expert) pair that computes each assignment of a rank: each takes as many as is planned.

    Args:
        ids_TK: the experts of its tokens.
        sent_P: [P] assignments that it sends to each pair.
        placement: the pairs.
    """
    order_P = placement.by_expert_P
    pair_N = np.empty(ids_TK.size, dtype=np.int64)
    pair_N[np.argsort(ids_TK.reshape(-1), kind="stable")] = np.repeat(order_P, sent_P[order_P])
    return pair_N.reshape(ids_TK.shape)


def rows_of_links(
    ids_WTK: np.ndarray, plan: DispatchPlan, ranks_per_node: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ranks send to ranks in one exchange.

    Args:
        ids_WTK: [W, T, K], the experts of all ranks' tokens.
        plan: which rank computes what.
        ranks_per_node: n.

    Returns:
        [W, W] rows of assignments at one level; at two, [W, G] rows of tokens to nodes, and [W, W] rows of assignments
        from their relays on.
    """
    placement, num_ranks = plan.placement, len(ids_WTK)
    flat_WW = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    rail_WG = np.zeros((num_ranks, num_ranks // ranks_per_node), dtype=np.int64)
    inside_WW = np.zeros_like(flat_WW)
    for rank, ids_TK in enumerate(ids_WTK):
        host_TK = placement.pair_rank_P[pairs_of_tokens(ids_TK, plan.for_rank(rank).sent_P, placement)]
        flat_WW[rank] = np.bincount(host_TK.reshape(-1), minlength=num_ranks)
        node_TK = host_TK // ranks_per_node
        for node in range(rail_WG.shape[1]):
            rail_WG[rank, node] = (node_TK == node).any(1).sum()
            relay = node * ranks_per_node + rank % ranks_per_node
            hosts = slice(node * ranks_per_node, (node + 1) * ranks_per_node)
            inside_WW[relay, hosts] += flat_WW[rank, hosts]
    return flat_WW, rail_WG, inside_WW


def exchange_seconds(
    ids_WTK: np.ndarray, plan: DispatchPlan, model: ModelSizes, cluster: Cluster, two_levels: bool
) -> float:
    """Of one layer's four exchanges: of each, the busiest rank's; links inside nodes and between them work at once.

    Args:
        ids_WTK: [W, T, K], the experts of all ranks' tokens.
        plan: which rank computes what.
        model: its sizes.
        cluster: the links.
        two_levels: whether a token travels once to a node, and then, behind that, inside it.
    """
    n = cluster.ranks_per_node
    flat_WW, rail_WG, inside_WW = rows_of_links(ids_WTK, plan, n)
    rank_W = np.arange(len(ids_WTK))
    is_far_WW = rank_W[:, None] // n != rank_W // n
    is_other_WW = rank_W[:, None] != rank_W
    row_bytes = model.dim * _BYTES

    def busiest(rows_WW: np.ndarray) -> float:
        return float(max(rows_WW.sum(0).max(), rows_WW.sum(1).max()))

    if not two_levels:
        inside = busiest(flat_WW * (is_other_WW & ~is_far_WW)) * row_bytes / cluster.node_bytes
        return _EXCHANGES * max(inside, busiest(flat_WW * is_far_WW) * row_bytes / cluster.network_bytes)
    # Between ranks of one number: a rank sends to the relay of its number on each node.
    rail_WW = np.zeros_like(flat_WW)
    for node in range(rail_WG.shape[1]):
        rail_WW[rank_W, node * n + rank_W % n] = rail_WG[:, node]
    labels = _LABEL_BYTES * model.top_k / _EXCHANGES
    between = busiest(rail_WW * is_far_WW) * (row_bytes + labels) / cluster.network_bytes
    return _EXCHANGES * (between + busiest(inside_WW * is_other_WW) * row_bytes / cluster.node_bytes)


@dataclass(frozen=True)
class Setting:
    """What all systems have in common.

    Attributes:
        model: its sizes.
        cluster: the links.
        flops: operations a second of a rank.
        micro_batches: of a step. Tokens travel in each of them, weights and gradients once a step.
        before_E: [E] int64, popularity of the micro-batch that placements are made from.
        ids_WTK: [W, T, K] int64, the experts of all tokens of a micro-batch.
    """

    model: ModelSizes
    cluster: Cluster
    flops: float
    micro_batches: int
    before_E: np.ndarray
    ids_WTK: np.ndarray


def measure(system: System, setting: Setting) -> dict[str, float]:
    """Milliseconds of one layer in a step, its slots on a rank, and the busiest rank's assignments over the mean.

    Args:
        system: how experts are placed, and tokens sent.
        setting: the step.
    """
    model, cluster, n = setting.model, setting.cluster, setting.cluster.ranks_per_node
    size = n if system.groups else RANKS
    slots = -(-model.num_experts // size)
    if system.replicates:
        slots = SwiftMoEConfig().resolve_slots_per_rank(model.num_experts, size)
    (placement,) = make_policy(system.policy, size, slots, n).place(Forecast.of(setting.before_E[None].astype(float)))
    exchange, load = 0.0, 0
    for ids_wTK in setting.ids_WTK.reshape(-1, size, *setting.ids_WTK.shape[1:]):
        counts_wE = np.stack([np.bincount(ids.reshape(-1), minlength=model.num_experts) for ids in ids_wTK])
        plan = plan_dispatch(counts_wE, placement, ranks_per_node=n)
        exchange = max(exchange, exchange_seconds(ids_wTK, plan, model, cluster, system.two_levels))
        load = max(load, int(plan.load_W.max()))
    num_tokens = setting.ids_WTK.shape[1]
    flops = load * model.expert_parameters + num_tokens * model.dense_parameters / model.num_layers
    seconds = {
        "exchange": setting.micro_batches * exchange,
        "weights": weight_seconds(placement, model, cluster) if system.replicates else 0.0,
        "compute": setting.micro_batches * _OPERATIONS * flops / setting.flops,
    }
    milliseconds = {f"{part}_ms": 1e3 * value for part, value in seconds.items()}
    return {
        "slots_mb": slots * model.expert_parameters * _BYTES / 1e6,
        "imbalance": load / (num_tokens * model.top_k),
        **milliseconds,
        "step_ms": sum(milliseconds.values()),
    }


def weight_seconds(placement: Placement, model: ModelSizes, cluster: Cluster) -> float:
    """Gradients collected and weights distributed in one layer, in a group and between groups: the busiest rank's.

    Args:
        placement: of one expert group.
        model: its sizes.
        cluster: all ranks.
    """
    size, expert_bytes = placement.world_size, model.expert_parameters * _BYTES
    message = busiest_phase(placement) * expert_bytes / (size - 1)
    owned = model.num_experts * expert_bytes / RANKS
    return 2 * (cluster.in_group_seconds(size, message) + cluster.between_groups_seconds(size, owned))


def compare(model: ModelSizes, links: str, routing: str, num_tokens: int, micro_batches: int) -> dict[str, Any]:
    """One layer in one step under each system: system -> its figures.

    Args:
        model: its sizes.
        links: a key of `CLUSTERS`.
        routing: a key of `ROUTINGS`.
        num_tokens: T of a rank and micro-batch.
        micro_batches: of a step.
    """
    rng, (cluster, flops) = np.random.default_rng(0), CLUSTERS[links]
    log_weight_E = -ROUTINGS[routing] * np.log(np.arange(1.0, model.num_experts + 1))
    log_weight_E = rng.permutation(log_weight_E).astype(np.float32)
    before_WTK, ids_WTK = (draw(rng, log_weight_E, num_tokens, model.top_k) for _ in range(2))
    before_E = np.bincount(before_WTK.reshape(-1), minlength=model.num_experts)
    setting = Setting(model, cluster, flops, micro_batches, before_E, ids_WTK)
    figures = {name: measure(system, setting) for name, system in SYSTEMS.items()}
    first = figures["megatron"]
    for numbers in figures.values():
        for part in ("exchange", "step"):
            numbers[f"{part}_speedup"] = first[f"{part}_ms"] / numbers[f"{part}_ms"]
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = command_line("placement.two_levels", __doc__)
    parser.set_defaults(name="placement_two_levels")
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank and micro-batch")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step")
    arguments = parser.parse_args(argv)
    provenance = collect_provenance()
    rows: list[dict[str, Any]] = []
    for name, links, routing in product(MODELS, CLUSTERS, ROUTINGS):
        figures = compare(read_model(name), links, routing, arguments.tokens, arguments.micro_batches)
        rows.append({"model": name, "links": links, "routing": routing, "systems": figures})
        print(f"\n{name}, {links}, {routing}\n{'':12}" + "".join(f"{key:>18}" for key in figures["ours"]))
        for system, numbers in figures.items():
            print(f"{system:12}" + "".join(f"{value:18.3f}" for value in numbers.values()))
    results = {"tokens": arguments.tokens, "micro_batches": arguments.micro_batches, "rows": rows}
    print(f"written to {write_result(arguments.name, provenance, results)}")


if __name__ == "__main__":
    main()
