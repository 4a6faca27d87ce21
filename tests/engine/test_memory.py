"""The most memory of a rank in a step is what docs/training-step.md says."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import swiftmoe_lightning as sml
from swiftmoe_lightning.analysis import Cluster, GroupCost, ModelSizes, Workload
from tests.helpers import run_ranks

DIM, HIDDEN, EXPERTS, NUM_LAYERS, SLOTS = 512, 512, 8, 6, 5
# Of one expert, in float32.
EXPERT_BYTES = 3 * DIM * HIDDEN * 4


class MostBytes(TorchDispatchMode):
    """The most bytes of all tensors alive at a time, of those that operations have seen, and of the slots'.

    slots: gives them; their storages may change their sizes.
    """

    def __init__(self, slots: Callable[[], list[torch.Tensor]]) -> None:
        super().__init__()
        self.most = 0
        self._slots = slots
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, out)):
            if isinstance(leaf, torch.Tensor) and type(leaf) in (torch.Tensor, nn.Parameter):
                storage = leaf.untyped_storage()
                if storage.data_ptr():
                    self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        storages = [slot.untyped_storage() for slot in self._slots()]
        others = self._alive.keys() - {storage._cdata for storage in storages}
        now = sum(self._alive[key][1] for key in others) + sum(storage.nbytes() for storage in storages)
        self.most = max(self.most, now)
        return out


def most_bytes(frees_slots: bool) -> tuple[int, int]:
    """The most bytes of a step, and P."""
    # What only the garbage collector would free is memory, too.
    gc.disable()
    torch.manual_seed(0)
    module = nn.Sequential(*[sml.MoE(DIM, HIDDEN, EXPERTS, 1) for _ in range(NUM_LAYERS)])
    config = sml.SwiftMoEConfig(slots_per_rank=SLOTS, placement="packed", reshard_after_forward=frees_slots)
    engine = sml.SwiftMoEEngine(module, config)
    optimizer = engine.prepare_optimizer(torch.optim.AdamW(module.parameters(), fused=True))
    x = torch.randn(16, DIM, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step() -> None:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    step()
    with MostBytes(lambda: [w for layer in engine.layers for w in layer.slots.weights.values()]) as memory:
        step()
        step()
    return memory.most, engine.layers[0].placement.num_pairs


@pytest.mark.parametrize("frees_slots", [False, True])
def test_most_bytes_of_a_step_are_the_formulas(frees_slots: bool) -> None:
    num_filled = 3 if frees_slots else NUM_LAYERS
    for most, num_pairs in run_ranks(most_bytes, 2, frees_slots):
        owned, whole = EXPERTS * EXPERT_BYTES / 2, SLOTS * EXPERT_BYTES
        buffers = owned + (num_pairs - EXPERTS) * EXPERT_BYTES / 2
        expected = NUM_LAYERS * 4 * owned + num_filled * whole + 2 * whole + buffers
        assert abs(most / expected - 1) <= 0.05, most / expected
        # The planner's, which does not know whether blocks travel packed.
        sizes = ModelSizes(
            num_layers=NUM_LAYERS,
            num_experts=EXPERTS,
            top_k=1,
            dim=DIM,
            hidden_dim=HIDDEN,
            dense_parameters=NUM_LAYERS * DIM * EXPERTS,
        )
        dtypes = {"param_dtype": "float32", "reduce_dtype": "float32"}
        cost = GroupCost(
            sizes, Cluster(num_ranks=2), Workload(tokens=16, **dtypes, reshard_after_forward=frees_slots), 2
        )
        assert cost.slot_bytes == num_filled * whole
        assert abs(most / cost.resident_bytes - 1) <= 0.1, most / cost.resident_bytes
