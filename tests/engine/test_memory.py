"""The most memory of a rank in a step is what docs/training-step.md says."""

from __future__ import annotations

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swiftmoe_lightning as sml
from tests.helpers import run_ranks

DIM, HIDDEN, EXPERTS, NUM_LAYERS, SLOTS = 512, 512, 8, 6, 5
# Of one expert, in float32.
EXPERT_BYTES = 3 * DIM * HIDDEN * 4


class MostBytes(TorchDispatchMode):
    """The most bytes of all tensors alive at a time, of those that operations have seen."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and type(leaf) in (torch.Tensor, nn.Parameter):
                storage = leaf.untyped_storage()
                if storage.data_ptr():
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._alive.values()))
        return out


def most_bytes() -> tuple[int, int]:
    """The most bytes of a step, and P."""
    # What only the garbage collector would free is memory, too.
    gc.disable()
    torch.manual_seed(0)
    module = nn.Sequential(*[sml.MoE(DIM, HIDDEN, EXPERTS, 1) for _ in range(NUM_LAYERS)])
    engine = sml.SwiftMoEEngine(module, sml.SwiftMoEConfig(slots_per_rank=SLOTS, placement="packed"))
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), fused=True))
    x = torch.randn(16, DIM, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    with MostBytes() as memory:
        step()
        step()
    return memory.most, engine.layers[0].placement.num_pairs


def test_most_bytes_of_a_step_are_the_formulas() -> None:
    for most, num_pairs in run_ranks(most_bytes, 2):
        owned, whole = EXPERTS * EXPERT_BYTES / 2, SLOTS * EXPERT_BYTES
        buffers = owned + (num_pairs - EXPERTS) * EXPERT_BYTES / 2
        expected = NUM_LAYERS * (4 * owned + whole) + 2 * whole + buffers
        assert abs(most / expected - 1) <= 0.05, most / expected
