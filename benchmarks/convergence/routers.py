"""Balance and drops of each router on real text: `python -m benchmarks.convergence.routers [--steps 100]`.

Trains the model of preset "quick", top-2, with each router on an emulated cluster of 16 ranks at capacity factor 1,
from one seed, on the text of the demo, without an auxiliary loss. Prints a table: the busiest expert's load over the
mean, and the share of assignments that static and adaptive replicas drop, means over the second half of the steps and
all layers; and the validation loss with adaptive replicas. Where tokens compete for experts (sinkhorn, expert choice),
they are those of all ranks. Clusters are those of `.clustered`, of each sequence's first half, whose loss counts, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Final

import torch
from torch import nn

from benchmarks.convergence.cluster import EmulatedCluster
from benchmarks.convergence.clusters import fit_clusters, give_ids, prompt_embeddings
from benchmarks.convergence.corpus import Corpus
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.systems import SYSTEMS
from benchmarks.convergence.training import batches, dropped_share, make_model, make_optimizer, stack, validate
from swiftmoe_lightning import modules
from swiftmoe_lightning.demo.gpt import NUM_BYTES, next_byte_loss
from swiftmoe_lightning.demo.text import read_texts, split_texts

NUM_GROUPS: Final = 4
# What makes a router of (dim, num_experts, top_k).
ROUTERS: Final[dict[str, Callable[..., nn.Module]]] = {
    "top-k": modules.TopKRouter,
    "top-k, bias 1e-3": lambda *sizes: modules.TopKRouter(*sizes, bias_update_rate=1e-3),
    "group-limited": lambda *sizes: modules.GroupLimitedRouter(*sizes, num_groups=NUM_GROUPS, top_k_groups=2),
    "jitter": modules.JitterRouter,
    "noisy": modules.NoisyTopKRouter,
    "sinkhorn": modules.SinkhornRouter,
    "hash": lambda *sizes: modules.HashRouter(*sizes, vocab_size=NUM_BYTES),
    "clustered": lambda *sizes: modules.ClusteredRouter(*sizes, num_groups=NUM_GROUPS),
    "expert choice": modules.ExpertChoiceRouter,
}


@dataclass(frozen=True)
class Figures:
    """One row of the table, without its name.

    Attributes:
        imbalance: of experts, not of ranks.
        dropped: share of assignments.
        loss: nats a byte.
    """

    imbalance: float
    dropped: float
    loss: float


def measure(router: str, system: str, setting: Setting, corpus: Corpus) -> Figures:
    """Train once."""
    torch.manual_seed(0)
    model = make_model(setting)
    for block in model.blocks:
        block.moe.router = ROUTERS[router](setting.dim, setting.num_experts, setting.top_k)
    if router == "clustered":
        clusters = fit_clusters(corpus.train, setting.seq_len, NUM_GROUPS)
        give_ids(model, lambda bytes_BT: {"cluster_ids": clusters(prompt_embeddings(bytes_BT))})
    else:
        give_ids(model, lambda bytes_BT: {"token_ids": bytes_BT})
    cluster = EmulatedCluster(
        model, SYSTEMS[system], setting.num_ranks, setting.slots_per_rank, setting.capacity_factor, seed=0
    )
    optimizer, schedule = make_optimizer(model, setting)
    sequences, imbalance, dropped = batches(corpus, setting, seed=0), [], []
    for step in range(setting.num_steps):
        next_byte_loss(
            model, stack(sequences, step * setting.num_sequences, (step + 1) * setting.num_sequences)
        ).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        imbalance.append(mean(load.popularity_E.max() / load.popularity_E.mean() for load in cluster.loads.values()))
        dropped.append(dropped_share(cluster.loads.values()))
        cluster.after_update()
    half = setting.num_steps // 2
    return Figures(mean(imbalance[half:]), mean(dropped[half:]), validate(model.eval(), corpus, setting))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    steps = parser.parse_args(arguments).steps
    setting = Setting(num_layers=2, top_k=2, aux_loss_coef=0.0, num_steps=steps, warm_up=10)
    corpus = Corpus(*split_texts(read_texts(None), setting.seq_len))
    header = ["router", "busiest expert / mean", "dropped, static", "dropped, adaptive", "validation loss"]
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    for router in ROUTERS:
        static, adaptive = (measure(router, system, setting, corpus) for system in ("static", "balanced"))
        row = [
            router,
            f"{adaptive.imbalance:.1f}",
            f"{static.dropped:.1%}",
            f"{adaptive.dropped:.1%}",
            f"{adaptive.loss:.2f}",
        ]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
