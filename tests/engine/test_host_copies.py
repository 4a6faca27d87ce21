"""How often a layer's forward copies between host and device, and that nothing else in it would wait for a GPU."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import swiftmoe_lightning as sml
from swiftmoe_lightning.distributed import HostCopy, to_device
from swiftmoe_lightning.modules import expert_inputs
from swiftmoe_lightning.ops import backend
from tests.engine import models
from tests.helpers import nightly, run_ranks

NUM_LAYERS = 2
# Their results, or their sizes, are the device's to know.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")


class HostReads(TorchDispatchMode):
    """Keeps the operators that would make the host wait if their tensors were on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        has_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        has_unknown_size = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in READS or has_mask or has_unknown_size:
            self.names.append(name)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: x.nonzero(), "nonzero"),
    ],
)
def test_a_read_is_found(operation: Any, name: str) -> None:
    with HostReads() as reads:
        operation(torch.ones(2))
    assert name in reads.names


def copies(capacity_factor: float | None, forced: str) -> list[tuple[int, int, list[str]]]:
    """Of each step: copies up, copies down, and other reads of what would be on a GPU."""
    model = models.build(capacity_factor=capacity_factor, aux_loss_coef=0.1, num_shared_experts=1)
    config = sml.SwiftMoEConfig(placement=models.RandomPolicy, slots_per_rank=4)
    optimizer = sml.SwiftMoEEngine(model, config).prepare_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    up, down = mock.Mock(side_effect=to_device), mock.Mock()
    wait = HostCopy.wait

    def counted_wait(copy: HostCopy) -> Any:
        down()
        return wait(copy)

    package = [module for name, module in sys.modules.items() if name.startswith("swiftmoe_lightning")]
    steps = []
    with ExitStack() as patches:
        for module in package:
            if getattr(module, "to_device", None) is to_device:
                patches.enter_context(mock.patch.object(module, "to_device", up))
        patches.enter_context(mock.patch.object(HostCopy, "wait", counted_wait))
        patches.enter_context(mock.patch.object(expert_inputs, "_may_wait_for", return_value=False))
        patches.enter_context(backend.force_backend(forced))
        for step in range(3):
            x, target = (models.my_part(t, dist.get_rank(), 2) for t in models.dense.batch(step, 0, torch.float32))
            before = up.call_count, down.call_count
            with HostReads() as reads:
                loss = (model(x) - target).square().mean() + sml.auxiliary_loss(model)
            steps.append((up.call_count - before[0], down.call_count - before[1], reads.names))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return steps


@pytest.mark.parametrize("capacity_factor", [*nightly(None), 0.5])
def test_a_layers_forward_copies_twice_up_and_once_down(capacity_factor: float | None) -> None:
    pytest.importorskip("triton")
    for steps in run_ranks(copies, 2, capacity_factor, "triton"):
        # The first forward also sends the first weights, with a table of their own.
        assert steps == [(3 * NUM_LAYERS, NUM_LAYERS, [])] + [(2 * NUM_LAYERS, NUM_LAYERS, [])] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("capacity_factor", [None, 0.5, 100.0])
def test_on_a_gpu_nothing_else_waits(capacity_factor: float | None) -> None:
    torch.manual_seed(0)
    moe = sml.MoE(16, 32, 4, 2, capacity_factor=capacity_factor, aux_loss_coef=0.1, device="cuda")
    x = torch.randn(64, 16, device="cuda", requires_grad=True)
    # The first run compiles kernels, which waits.
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            (moe(x).square().sum() + sml.auxiliary_loss(moe)).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
