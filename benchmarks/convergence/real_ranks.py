"""The same training on real ranks: gloo processes under the product's engine, each with its part of every batch.

python -m benchmarks.convergence.real_ranks --system balanced

prints the losses and drops of every step beside those of the emulated cluster: equal, up to the rounding of sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from benchmarks.common.across_ranks import total
from benchmarks.common.flexmoe import flexmoe_policy, move_state
from benchmarks.common.phases import named_phases
from benchmarks.convergence.corpus import Corpus, load_corpus
from benchmarks.convergence.presets import PRESETS
from benchmarks.convergence.settings import Setting
from benchmarks.convergence.systems import SYSTEMS, System
from benchmarks.convergence.training import (
    batches,
    dropped_share,
    largest_load,
    make_model,
    make_optimizer,
    stack,
    train,
)
from swiftmoe_lightning import LoadReader, SwiftMoEConfig, SwiftMoEEngine, auxiliary_loss
from swiftmoe_lightning.demo.gpt import next_byte_loss
from swiftmoe_lightning.modules import MoE
from swiftmoe_lightning.placement import Capacity
from tests.helpers import run_ranks

# Those whose drops the product has.
REAL_SYSTEMS: Final = tuple(system for system in SYSTEMS if system != "deepspeed")
# What a step spends its time on, in order: the package's named ranges and, around them, the training loop's parts.
PHASES: Final = {
    "forward": "forward, but for the experts' parts below",
    "route": "router",
    "count": "all ranks' counts of each expert's tokens",
    "plan": "which slot serves which token",
    "dispatch": "tokens to the experts",
    "experts": "experts",
    "combine": "tokens back, and their sums",
    "backward": "backward",
    "collect": "experts' gradients to the optimizer's shards",
    "clip": "clip",
    "update": "optimizer",
    "place": "next placement",
    "distribute": "the experts' weights to their slots, and the wait for them",
    "move": "move optimizer state along with replicas",
}


@dataclass(eq=False)
class RankRun:
    """What one rank saw. S steps.

    Attributes:
        losses: [S] nats a byte, the mean over ranks.
        dropped: [S] share of assignments, all layers.
        largest_load: [S] as of `Run`.
        phases: [S] each step's seconds on this rank by `PHASES`, with the wait for the others.
    """

    losses: list[float] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    largest_load: list[float] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """[S] of each step on this rank."""
        return [sum(phases.values()) for phases in self.phases]


def train_on_ranks(setting: Setting, system: str, seed: int, corpus: Corpus) -> RankRun:
    """Train on the ranks of the default process group; called on each of them.

    Args:
        setting: its `num_ranks` is the group's size.
        system: one of `REAL_SYSTEMS`.
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
        with named_phases() as watch:
            with watch.phase("forward"):
                loss = next_byte_loss(wrapped, batch_BT)
            with watch.phase("backward"):
                (loss + auxiliary_loss(model)).backward()
            with watch.phase("clip"):
                engine.clip_grad_norm_(1.0)
            with watch.phase("update"):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            if chosen.keeps_state_with_weights:
                with watch.phase("move"):
                    move_state(model, before, engine.placements)
        run.phases.append(dict(watch.seconds))
        run.losses.append(loss.item())
        loads = reader.read().values()
        run.dropped.append(dropped_share(loads))
        run.largest_load.append(largest_load(loads))
    # After all steps: ranks that waited for each other in between would wait for weights that are on their way, too.
    run.losses = [loss / dist.get_world_size() for loss in total(run.losses)]
    return run


def _limit(model: torch.nn.Module, system: System, factor: float | None) -> None:
    for block in model.modules():
        if isinstance(block, MoE) and system.capacity != "none" and factor is not None:
            block.experts.capacity = Capacity(factor, system.candidate.capacity_per)


def _config(system: str, setting: Setting) -> SwiftMoEConfig:
    name, _, interval = system.partition("-")
    placement: Any = flexmoe_policy(int(interval)) if interval else {"dropless": "balanced"}.get(name, name)
    split = SYSTEMS[system].candidate.split
    return SwiftMoEConfig(slots_per_rank=setting.slots_per_rank, placement=placement, token_split=split)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence.real_ranks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--system", choices=REAL_SYSTEMS, default="balanced")
    parser.add_argument("--ranks", type=int, default=4, help="gloo processes; they share the preset's slots and batch")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick", help="whose first setting is trained")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--folder", type=Path, default=Path("runs/convergence"), help="for the corpus")
    given = parser.parse_args(arguments)
    try:
        setting = replace(PRESETS[given.preset][0].setting, num_steps=given.steps).over(given.ranks)
    except ValueError as error:
        parser.error(str(error))
    corpus = load_corpus(setting.corpus, given.folder / "corpus")
    real = run_ranks(train_on_ranks, given.ranks, setting, given.system, given.seed, corpus, timeout_s=3600)[0]
    emulated = train(setting, given.system, given.seed, corpus)
    print(
        f"{given.system} on {given.ranks} gloo ranks, and emulated\nstep  loss: real  emulated  dropped: real  emulated"
    )
    rows = list(zip(real.losses, emulated.train_loss, real.dropped, emulated.dropped, strict=True))
    for step, (loss, other_loss, dropped, other_dropped) in enumerate(rows):
        print(f"{step:4} {loss:11.6f} {other_loss:9.6f} {dropped:14.2%} {other_dropped:9.2%}")
    differences = (max(abs(row[i] - row[i + 1]) for row in rows) for i in (0, 2))
    print("largest difference: loss {:.1e}, dropped {:.2%}".format(*differences))


if __name__ == "__main__":
    main()
