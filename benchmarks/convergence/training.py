"""One run: a model, trained by one system from one seed, and what was seen on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common.files import written_whole
from benchmarks.convergence.cluster import EmulatedCluster
from benchmarks.convergence.corpus import Corpus
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.systems import SYSTEMS
from swiftmoe_lightning.analysis.cost import busiest_phase
from swiftmoe_lightning.demo.gpt import GPT, next_byte_loss
from swiftmoe_lightning.demo.text import Sequences
from swiftmoe_lightning.modules import TopKRouter, auxiliary_loss
from swiftmoe_lightning.placement import ExpertLoad, Placement


@dataclass(eq=False)
class Run:
    """What one run saw. S steps, V validations.

    Attributes:
        system: one of `SYSTEMS`.
        seed: of weights, data order and random drops.
        train_loss: [S] nats a byte, with the system's own drops.
        dropped: [S] share of assignments, all layers.
        largest_load: [S] mean over layers of the most that a rank computed, over the mean of what was routed.
        num_pairs: [S] (rank, expert) pairs, all layers.
        moved_pairs: [S] those that were not there a step before.
        popularity: [S][E] assignments of the first layer.
        replicas: [S][E] slots of the first layer's experts.
        busiest: [S] mean over layers of `cost.busiest_phase`.
        validation_steps: [V] steps done.
        validation_loss: [V] nats a byte, without drops.
        seconds: of the whole run, on this machine.
    """

    system: str
    seed: int
    train_loss: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    largest_load: list[float] = field(default_factory=list)
    num_pairs: list[int] = field(default_factory=list)
    moved_pairs: list[int] = field(default_factory=list)
    popularity: list[list[int]] = field(default_factory=list)
    replicas: list[list[int]] = field(default_factory=list)
    busiest: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote."""
        return cls(**json.loads(path.read_text())["run"])

    def save(self, path: Path, setting: Setting, provenance: dict[str, Any]) -> None:
        """Write the run, whole or not at all.

        Args:
            path: a JSON file.
            setting: what was trained.
            provenance: on what it was measured.
        """
        content = {"certificate": provenance, "setting": asdict(setting), "run": asdict(self)}
        with written_whole(path) as unfinished:
            unfinished.write_text(json.dumps(content) + "\n")

    def note_loads(self, loads: dict[str, ExpertLoad], before: dict[str, Placement]) -> None:
        """Keep a step's loads.

        Args:
            loads: layer name -> its load.
            before: layer name -> where its experts were in the step before.
        """
        first = next(iter(loads.values()))
        self.popularity.append(first.popularity_E.tolist())
        self.replicas.append(first.placement.replica_counts_E.tolist())
        self.dropped.append(dropped_share(loads.values()))
        self.largest_load.append(largest_load(loads.values()))
        self.num_pairs.append(sum(load.placement.num_pairs for load in loads.values()))
        self.moved_pairs.append(sum(before[name].num_moved(load.placement) for name, load in loads.items()))
        self.busiest.append(float(np.mean([busiest_phase(load.placement) for load in loads.values()])))


def dropped_share(loads: Collection[ExpertLoad]) -> float:
    """Share of one step's assignments that were dropped, all layers."""
    return sum(load.num_dropped_tokens for load in loads) / sum(load.num_assignments for load in loads)


def largest_load(loads: Collection[ExpertLoad]) -> float:
    """The most that a rank computed in one step, over the mean of what was routed; the mean over layers."""
    return float(np.mean([load.load_W.max() * len(load.load_W) / load.num_assignments for load in loads]))


def make_model(setting: Setting) -> GPT:
    """The model, from torch's default generator."""
    model = GPT(
        setting.num_layers,
        setting.dim,
        hidden_dim=setting.hidden_dim,
        num_experts=setting.num_experts,
        top_k=setting.top_k,
        aux_loss_coef=setting.aux_loss_coef,
    )
    if setting.bias_update_rate:
        for block in model.blocks:
            rate = setting.bias_update_rate
            block.moe.router = TopKRouter(setting.dim, setting.num_experts, setting.top_k, bias_update_rate=rate)
    return model


def make_optimizer(model: nn.Module, setting: Setting) -> tuple[torch.optim.Optimizer, Any]:
    """AdamW, and a learning rate that rises and then stays."""
    optimizer = torch.optim.AdamW(model.parameters(), setting.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / setting.warm_up, 1.0))
    return optimizer, schedule


def batches(corpus: Corpus, setting: Setting, seed: int) -> Sequences:
    """All sequences of a run: those of step i, rank r are rows (i * W + r) * b .. + b, b sequences a rank."""
    return Sequences.at_random(corpus.train, setting.seq_len, setting.num_steps * setting.num_sequences, seed)


def stack(sequences: Sequences, start: int, stop: int) -> Tensor:
    """[stop - start, T + 1] int64."""
    return torch.stack([sequences[i] for i in range(start, stop)])


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, setting: Setting) -> float:
    """Nats a byte of the validation text, every assignment computed."""
    sequences = Sequences.evenly(corpus.validation, setting.seq_len, setting.num_validation)
    starts = range(0, setting.num_validation, setting.num_sequences)
    ends = [min(start + setting.num_sequences, setting.num_validation) for start in starts]
    total = sum(
        float(next_byte_loss(model, stack(sequences, start, end))) * (end - start)
        for start, end in zip(starts, ends, strict=True)
    )
    return total / setting.num_validation


def train(setting: Setting, system: str, seed: int, corpus: Corpus) -> Run:
    """Train one model on an emulated cluster.

    Args:
        setting: what is trained.
        system: one of `SYSTEMS`.
        seed: the same one gives every system the same weights and the same data in the same order.
        corpus: the text.
    """
    begin = time.perf_counter()
    torch.manual_seed(seed)
    model = make_model(setting)
    cluster = EmulatedCluster(
        model, SYSTEMS[system], setting.num_ranks, setting.slots_per_rank, setting.capacity_factor, seed
    )
    optimizer, schedule = make_optimizer(model, setting)
    sequences, run = batches(corpus, setting, seed), Run(system, seed)
    before = cluster.placements
    for step in range(setting.num_steps):
        if step % setting.validate_every == 0:
            run.validation_steps.append(step)
            run.validation_loss.append(validate(model, corpus, setting))
        batch_BT = stack(sequences, step * setting.num_sequences, (step + 1) * setting.num_sequences)
        loss = next_byte_loss(model, batch_BT)
        (loss + auxiliary_loss(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        run.train_loss.append(loss.item())
        run.note_loads(cluster.loads, before)
        before = cluster.placements
        cluster.after_update()
    run.validation_steps.append(setting.num_steps)
    run.validation_loss.append(validate(model, corpus, setting))
    run.seconds = time.perf_counter() - begin
    return run
