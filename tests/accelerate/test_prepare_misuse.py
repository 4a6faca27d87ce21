"""What `accelerate.prepare` refuses, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

import swiftmoe_lightning as sml
from swiftmoe_lightning.accelerate import check_processes
from tests.engine import dense, models
from tests.helpers import rank_errors


def build_under_two_accelerators() -> None:
    model = models.build()
    for _ in range(2):
        accelerator = Accelerator(cpu=True)
        sml.accelerate.prepare(accelerator, model, torch.optim.AdamW(model.parameters()))


def build_twice() -> None:
    accelerator = Accelerator(cpu=True)
    model = models.build()
    optimizer = torch.optim.AdamW(model.parameters())
    model, optimizer = sml.accelerate.prepare(accelerator, model, optimizer)
    sml.accelerate.prepare(accelerator, model, optimizer)


def build_with_foreign_optimizer() -> None:
    sml.accelerate.prepare(Accelerator(cpu=True), models.build(), torch.optim.AdamW(models.build().parameters()))


def build_after_a_step(kind: Any = torch.optim.AdamW, **options: Any) -> None:
    model = models.build()
    optimizer = kind(model.parameters(), **options)
    model(torch.randn(4, dense.DIM)).sum().backward()
    optimizer.step()
    sml.accelerate.prepare(Accelerator(cpu=True), model, optimizer)


def build_the_wrong_way_round() -> None:
    model = models.build()
    sml.accelerate.prepare(Accelerator(cpu=True), torch.optim.AdamW(model.parameters()), model)


def build_where_accelerate_sees_one_process() -> None:
    model = models.build()
    accelerator = Accelerator()
    sml.accelerate.prepare(accelerator, model, torch.optim.AdamW(model.parameters()))


def join_uneven_inputs() -> None:
    model = models.build()
    wrapped, _ = sml.accelerate.prepare(Accelerator(cpu=True), model, torch.optim.AdamW(model.parameters()))
    with wrapped.join(enable=False):
        wrapped(torch.randn(4, dense.DIM))
    with wrapped.join():
        wrapped(torch.randn(4, dense.DIM))


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (build_twice, "has been prepared already. Call swiftmoe_lightning.accelerate.prepare instead"),
        (build_under_two_accelerators, "has been prepared already. Call swiftmoe_lightning.accelerate.prepare instead"),
        (build_with_foreign_optimizer, "12 parameters of the optimizer are not the model's"),
        (build_after_a_step, "the optimizer has stepped already"),
        (partial(build_after_a_step, torch.optim.SGD, lr=0.1, momentum=0.9), "the optimizer has stepped already"),
        (build_the_wrong_way_round, "prepare takes the accelerator, the model, then the optimizer, got a AdamW"),
        (join_uneven_inputs, "need equally many training batches, and cannot join uneven inputs"),
        (build_where_accelerate_sees_one_process, "2 processes were started, but this Accelerator sees 1"),
    ],
)
def test_misuse_is_named_on_every_rank(misuse: Callable[[], None], message: str) -> None:
    for error in rank_errors(misuse, 2, init=False):
        assert message in error


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_another_parallelism_of_accelerates_is_refused(kind: str) -> None:
    """A stand-in for the accelerator, which could be set up so on GPUs alone."""
    accelerator: Any = SimpleNamespace(num_processes=1, distributed_type=DistributedType[kind])
    with pytest.raises(ValueError, match=f"Accelerate is set up for {kind}, which cuts the model itself"):
        check_processes(accelerator, "Accelerator", "Accelerator(cpu=True)")


def test_plain_data_parallelism_is_not_refused() -> None:
    accelerator: Any = SimpleNamespace(num_processes=1, distributed_type=DistributedType.MULTI_GPU)
    check_processes(accelerator, "Accelerator", "Accelerator(cpu=True)")
