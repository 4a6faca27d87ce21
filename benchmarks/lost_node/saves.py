"""The two ranks that save."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
import torch.distributed as dist

import swiftmoe_lightning as sml
from benchmarks.common.command_line import setting
from benchmarks.common.interleaved import interleaved, seconds_of
from benchmarks.common.spread import paired_ratio, spread
from swiftmoe_lightning.engine.checkpoint import save_directory
from tests.helpers import run_ranks

MEMORY: Final = "/dev/shm"
_WARM_UP: Final = 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the model, whose expert weights are float32, and the number of measurements."""

    layers: int = setting(4, "MoE layers")
    dim: int = setting(512, "model dim")
    hidden_dim: int = setting(512, "hidden dim of an expert")
    experts: int = setting(16, "experts of a layer")
    pairs: int = setting(5, "pairs of a ratio: two saves of each kind")


def save_on_rank(folder: str, sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each save on this rank, and the size of its part."""
    rank, steps = dist.get_rank(), itertools.count()
    module = torch.nn.ModuleList(sml.MoE(sizes.dim, sizes.hidden_dim, sizes.experts) for _ in range(sizes.layers))
    engine = sml.SwiftMoEEngine(module)
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters()))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    checkpoint = sml.MemoryCheckpoint(engine, [optimizer], f"{folder}/{rank}")
    whole_s: list[float] = []

    def save() -> float:
        dist.barrier()
        held_up_s = seconds_of(lambda: checkpoint.save(next(steps)))
        whole_s.append(held_up_s + seconds_of(checkpoint.wait))
        return held_up_s

    def save_whole_directory() -> float:
        dist.barrier()
        return seconds_of(lambda: save_directory(f"{folder}/directory", module, [optimizer], {}))

    def load() -> float:
        dist.barrier()
        return seconds_of(checkpoint.load)

    held_up_s, directory_s = interleaved(save, save_whole_directory, sizes.pairs, _WARM_UP)
    (part,) = checkpoint.folder.glob(f"*/__{rank}_0.distcp")
    megabytes = part.stat().st_size / 1e6
    return {
        "held_up_s": held_up_s,
        "whole_s": whole_s[_WARM_UP:],
        "directory_s": directory_s,
        "load_s": [load() for _ in range(2 * sizes.pairs)],
        "megabytes": [megabytes],
    }


def measure_saves(sizes: Sizes) -> dict[str, Any]:
    """All ranks wait for the slower one, so its seconds count."""
    with TemporaryDirectory(dir=MEMORY) as folder:
        ranks = run_ranks(save_on_rank, 2, folder, sizes, timeout_s=600)
    slower = {name: [max(values) for values in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}
    (megabytes,) = slower.pop("megabytes")
    return {
        "megabytes": megabytes,
        **{name: spread(values) for name, values in slower.items()},
        "held_up_over_directory": paired_ratio(slower["held_up_s"], slower["directory_s"]),
    }
