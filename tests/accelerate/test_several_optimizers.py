"""Several optimizers under Accelerate: each that is passed to `prepare` trains, on ranks as on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

import swiftmoe_lightning as sml
from tests.engine import dense, models
from tests.helpers import run_ranks


def train() -> dict[str, Tensor]:
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = models.build(torch.float64)
    experts = [p for name, p in model.named_parameters() if "experts" in name]
    rest = [p for name, p in model.named_parameters() if "experts" not in name]
    optimizers = torch.optim.AdamW(rest, lr=1e-2), torch.optim.SGD(experts, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[1], lambda step: 1 / (1 + step))
    wrapped, *prepared, scheduler = sml.accelerate.prepare(accelerator, model, *optimizers, scheduler)
    for step in range(3):
        x, target = (models.my_part(t, rank, world_size) for t in dense.batch(step, 0, torch.float64))
        accelerator.backward(F.mse_loss(wrapped(x), target))
        for optimizer in prepared:
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    return {name: value.clone() for name, value in accelerator.get_state_dict(wrapped).items()}


def test_every_optimizer_trains() -> None:
    (expected,) = run_ranks(train, 1)
    start = models.build(torch.float64).state_dict()
    assert all(not value.equal(start[name]) for name, value in expected.items())
    for actual in run_ranks(train, 2):
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)
