"""The systems that train the workload: ours by its placements, and others with the same model, weights and routes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Final

import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import swiftmoe_lightning as sml
from benchmarks.common.flexmoe import flexmoe_policy, move_state
from benchmarks.step.deepspeed_peer import deepspeed
from benchmarks.step.static_groups import static_groups
from benchmarks.step.training import TrainingSystem
from benchmarks.step.transformers_peer import transformers_ep
from benchmarks.step.workload import Model, Workload, optimizer_of

OURS: Final = "balanced"
FROZEN: Final = "frozen"
PACKED: Final = "packed"
# On nodes of one rank they are like others.
OF_NODES: Final = ("two_level", "hiermoe")


@dataclass(frozen=True)
class Builder:
    """How a system is made.

    Attributes:
        make: called on every rank.
        needs: module that must be there, as "transformers.distributed".
        drops: whether it drops assignments, and so trains otherwise.
    """

    make: Callable[[Workload], TrainingSystem]
    needs: str | None = None
    drops: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether what it needs is there."""
        parts = [] if self.needs is None else self.needs.split(".")
        return all(find_spec(".".join(parts[: i + 1])) is not None for i in range(len(parts)))


def adaptive(workload: Workload, **settings: Any) -> TrainingSystem:
    """The workload under our engine. A collective.

    Args:
        workload: what is trained.
        **settings: of `SwiftMoEConfig`.
    """
    model = Model(workload)
    engine = sml.SwiftMoEEngine(model, sml.SwiftMoEConfig(**settings))
    wrapped = engine.data_parallel()
    optimizer = engine.prepare_optimizer(optimizer_of(model.parameters()))
    return TrainingSystem(model=wrapped, optimizer=optimizer, source=model, engine=engine)


def unreplicated(workload: Workload, **settings: Any) -> TrainingSystem:
    """Our engine with each expert on one rank. A collective.

    Args:
        workload: what is trained.
        **settings: of `SwiftMoEConfig`.
    """
    return adaptive(workload, slots_per_rank=-(-workload.sizes.experts // dist.get_world_size()), **settings)


def flexmoe(workload: Workload, interval: int) -> TrainingSystem:
    """FlexMoE's placements, and its optimizer state moved along. A collective.

    Args:
        workload: what is trained.
        interval: steps between two revisions.
    """
    system = adaptive(workload, placement=flexmoe_policy(interval))
    engine = system.engine
    assert engine is not None

    def update() -> None:
        before = engine.placements
        system.optimizer.step()
        move_state(engine.module, before, engine.placements)

    system.update = update
    return system


def whole_experts(workload: Workload) -> TrainingSystem:
    """DDP: every expert whole on every rank. A collective."""
    model = Model(workload)
    return TrainingSystem(
        model=DistributedDataParallel(model), source=model, optimizer=optimizer_of(model.parameters())
    )


def fully_sharded(workload: Workload) -> TrainingSystem:
    """FSDP2: all parameters cut over the ranks; a block's experts are whole while it computes. A collective."""
    model = Model(workload)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return TrainingSystem(model=model, optimizer=optimizer_of(model.parameters()), source=model)


SYSTEMS: Final[Mapping[str, Builder]] = {
    OURS: Builder(adaptive),
    PACKED: Builder(partial(adaptive, placement="packed")),
    # Its placement is kept from the warm-up on.
    FROZEN: Builder(partial(adaptive, placement="packed")),
    "symi": Builder(partial(adaptive, placement="symi")),
    "static": Builder(partial(unreplicated, placement="static")),
    "flexmoe-10": Builder(partial(flexmoe, interval=10)),
    "zero1_static": Builder(static_groups),
    "ddp": Builder(whole_experts),
    "fsdp2": Builder(fully_sharded),
    "hf_ep": Builder(transformers_ep, needs="transformers.distributed.expert_parallel"),
    "deepspeed": Builder(partial(deepspeed, capacity_factor=None), needs="deepspeed"),
    "two_level": Builder(partial(adaptive, exchange="two_level")),
    "hiermoe": Builder(partial(unreplicated, placement="swap", exchange="two_level")),
    "deepspeed_drops": Builder(partial(deepspeed, capacity_factor=1.0), needs="deepspeed", drops=True),
}
