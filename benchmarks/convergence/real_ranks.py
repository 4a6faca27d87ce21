"""The same training on real ranks: gloo processes under the product's engine, each with its part of every batch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partialmethod
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.convergence.corpus import Corpus
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.systems import SYSTEMS, System
from benchmarks.convergence.training import (
    batches,
    dropped_share,
    largest_load,
    make_model,
    make_optimizer,
    stack,
)
from swiftmoe_lightning import LoadReader, SwiftMoEConfig, SwiftMoEEngine, auxiliary_loss
from swiftmoe_lightning.analysis.baselines import FlexMoEPolicy
from swiftmoe_lightning.demo.gpt import next_byte_loss
from swiftmoe_lightning.modules import MoE
from swiftmoe_lightning.placement import Capacity, Placement

# What AdamW keeps of a parameter beside the parameter itself, in parameters.
_STATE_COPIES: Final = 2


@dataclass(eq=False)
class RankRun:
    """What one rank saw. S steps.

    Attributes:
        losses: [S] nats a byte, the mean over ranks.
        dropped: [S] share of assignments, all layers.
        largest_load: [S] as of `Run`.
        seconds: [S] of each step on this rank, with the wait for the others.
    """

    losses: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    largest_load: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def train_on_ranks(setting: Setting, system: str, seed: int, corpus: Corpus) -> RankRun:
    """Train on the ranks of the default process group; called on each of them.

    Args:
        setting: its `num_ranks` is the group's size.
        system: one of `SYSTEMS` but "deepspeed", whose drops the product does not have.
        seed: as of `training.train`.
        corpus: the text.
    """
    rank, chosen = dist.get_rank(), SYSTEMS[system]
    torch.manual_seed(seed)
    model = make_model(setting)
    _limit(model, chosen, setting.capacity_factor)
    engine = SwiftMoEEngine(model, _config(system, setting))
    wrapped = engine.data_parallel()
    optimizer, schedule = make_optimizer(model, setting)
    engine.prepare_optimizer(optimizer)
    reader, sequences, run = LoadReader(model), batches(corpus, setting, seed), RankRun()
    for step in range(setting.num_steps):
        first = step * setting.num_sequences + rank * setting.sequences_per_rank
        batch_BT = stack(sequences, first, first + setting.sequences_per_rank)
        before = engine.placements
        dist.barrier()
        begin = time.perf_counter()
        loss = next_byte_loss(wrapped, batch_BT)
        (loss + auxiliary_loss(model)).backward()
        engine.clip_grad_norm_(1.0)
        optimizer.step()
        if chosen.keeps_state_with_weights:
            _move_state(model, before, engine.placements)
        optimizer.zero_grad()
        schedule.step()
        run.seconds.append(time.perf_counter() - begin)
        _note(run, loss, reader)
    return run


def _limit(model: torch.nn.Module, system: System, factor: float | None) -> None:
    for block in model.modules():
        if isinstance(block, MoE) and system.capacity != "none" and factor is not None:
            block.experts.capacity = Capacity(factor, system.candidate.capacity_per)


def _config(system: str, setting: Setting) -> SwiftMoEConfig:
    name, _, interval = system.partition("-")
    placement: Any = {"flexmoe": FlexMoEPolicy, "dropless": "balanced"}.get(name, name)
    if interval:
        init = partialmethod(FlexMoEPolicy.__init__, interval=int(interval))
        placement = type("FlexMoE", (FlexMoEPolicy,), {"__init__": init})
    split = SYSTEMS[system].candidate.split
    return SwiftMoEConfig(slots_per_rank=setting.slots_per_rank, placement=placement, token_split=split)


def _move_state(model: torch.nn.Module, before: dict[str, Placement], after: dict[str, Placement]) -> None:
    """Send as many bytes as the optimizer state of the experts that have moved: systems whose state lives beside the
    weights must, and ours never does. Every rank sends and gets its part."""
    experts = {name: module for name, module in model.named_modules() if name in after}
    for name, placement in after.items():
        moved = before[name].num_moved(placement)
        if moved:
            size = sum(p.numel() for p in experts[name].parameters()) // placement.num_experts
            part = -(-moved * size * _STATE_COPIES // placement.world_size**2) * placement.world_size
            received = torch.empty(part)
            dist.all_to_all_single(received, torch.zeros(part))


def _note(run: RankRun, loss: Tensor, reader: LoadReader) -> None:
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    run.losses.append(mean.item())
    loads = reader.read().values()
    run.dropped.append(dropped_share(loads))
    run.largest_load.append(largest_load(loads))
